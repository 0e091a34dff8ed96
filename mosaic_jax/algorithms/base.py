"""What a federated algorithm may change; every hook defaults to FedAvg.

All hooks are pure and about one client, except `aggregate`, which sees the weighted
mean of the uploads. A new algorithm is a frozen dataclass in a file of its own that
overrides what it needs; its fields are its hyper-parameters, set by
`config.methods.NAME`.
"""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.types import Array, ModelState, Tree


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Federated averaging (McMahan et al., 2017)."""

    # Clients keep a model of their own, to be judged beside the global one.
    personal = False
    # Clients hold parts of the network, by `channels` and `config.budgets`.
    partial = False
    # Statistics of the global model are asked of the clients, not averaged.
    queries = False
    # Their activations are scaled up in training by the inverse of their rate.
    scaler = False

    def init_server(self, model: ModelState) -> Tree:
        """State that the server keeps across rounds."""
        del model
        return {}

    def init_client(self, model: ModelState) -> Tree:
        """State that one client keeps across rounds."""
        del model
        return {}

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """The `kept` channels [kept] of `width` that a client holds in round `number`.

        Only of algorithms that are `partial`. `key` is that of the study, the client
        and the layer.
        """
        raise NotImplementedError

    def present(self, label_count: Array) -> Array | None:
        """Classes [K] bool whose rows of the classifier a client trains; None: all."""
        del label_count
        return None

    def weight(self, size: Array) -> Array:
        """Weights of clients with `size` images in every mean over clients."""
        return size

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The model that a client starts from, given the global `model`."""
        del client_state
        return model

    def logits(self, logits: Array, label_count: Array, number: Array) -> Array:
        """Logits [B, K] as the local loss of round `number` sees them.

        `label_count` [K] are the client's images of each class.
        """
        del label_count, number
        return logits

    def penalty(self, params: Tree, global_params: Tree, client_state: Tree) -> Array:
        """[] float32 added to the local loss."""
        del params, global_params, client_state
        return jnp.zeros(())

    def batch_stats(self, old: Tree, new: Tree, step: Array) -> Tree:
        """Running statistics after local step `step` = 0, 1, ...

        `old` are those before it and `new` those that batch-norm makes of them.
        """
        del old, step
        return new

    def upload(
        self, model: ModelState, local: ModelState, client_state: Tree
    ) -> tuple[Tree, Tree]:
        """What a client sends after training `local`, and its new state."""
        del model
        return local, client_state

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """New server state and global model from `sum_i n_i upload_i / sum_i n_i`.

        Uploads are only ever summed, so that memory does not grow with the clients.
        An algorithm that weighs parameters one by one uploads the weighted parameters
        and the weights, and divides here. `share` of all clients take part in a round.
        """
        del model, share
        return server_state, mean_upload
