"""What a federated algorithm may change; every hook defaults to FedAvg.

All hooks are pure and about one client, except `aggregate`, which sees the weighted
mean of the uploads. A new algorithm overrides what it needs in a file of its own.
"""

import jax.numpy as jnp

from mosaic_jax.types import Array, ModelState, Tree


class Algorithm:
    """Federated averaging (McMahan et al., 2017)."""

    def init_server(self, model: ModelState) -> Tree:
        """State that the server keeps across rounds."""
        del model
        return {}

    def init_client(self, model: ModelState) -> Tree:
        """State that one client keeps across rounds."""
        del model
        return {}

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The model that a client starts from, given the global `model`."""
        del client_state
        return model

    def logits(self, logits: Array, label_count: Array) -> Array:
        """Logits [B, K] as the local loss sees them; `label_count` [K]."""
        del label_count
        return logits

    def penalty(self, params: Tree, global_params: Tree, client_state: Tree) -> Array:
        """[] float32 added to the local loss."""
        del params, global_params, client_state
        return jnp.zeros(())

    def upload(
        self, model: ModelState, local: ModelState, client_state: Tree
    ) -> tuple[Tree, Tree]:
        """What a client sends after training `local`, and its new state."""
        del model
        return local, client_state

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree
    ) -> tuple[Tree, ModelState]:
        """New server state and global model from `sum_i n_i upload_i / sum_i n_i`.

        Uploads are only ever summed, so that memory does not grow with the clients.
        An algorithm that weighs parameters one by one uploads the weighted parameters
        and the weights, and divides here.
        """
        del model
        return server_state, mean_upload
