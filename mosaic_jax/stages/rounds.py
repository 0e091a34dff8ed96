"""Federated rounds: who takes part, local training, aggregation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import aggregation, parallel, prng, training, trees
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.settings import Local
from mosaic_jax.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Tree,
)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """All that rounds of one study have in common.

    Attributes:
      classifier: that clients train.
      algorithm: what they do otherwise than FedAvg.
      local: their SGD.
      axis: where clients run.
      augmentation: of their images.
      keep_models: clients' trained models enter the state.
      clients_per_round: drawn anew each round; 0: all of them. If fewer, `axis.place`
        must have put whole images on every device.
    """

    classifier: Classifier
    algorithm: Algorithm
    local: Local
    axis: parallel.ClientAxis
    augmentation: str
    keep_models: bool
    clients_per_round: int = 0

    def initial_state(self, model: ModelState) -> ServerState:
        """State before the first round."""
        count = self.axis.num_clients
        kept = trees.broadcast(model, count) if self.keep_models else ()
        return ServerState(
            model=model,
            server=self.algorithm.init_server(model),
            client=trees.broadcast(self.algorithm.init_client(model), count),
            client_model=kept,
        )

    def run(
        self, data: FederatedDataset, key: Array, state: ServerState, number: Array
    ) -> tuple[ServerState, Array]:
        """Round `number`, a pure function.

        Returns:
          The state, and the mean loss of each client that took part [m].
        """
        if not self._partial:
            each, loss, mean_upload = self.clients(
                self.axis, data, key, state, data.client, number
            )
            return self._aggregated(state, mean_upload, *each), loss
        who = self.participants(key, number)
        client, own = trees.take((data.client, (state.client, state.client_model)), who)
        chosen = state.replace(client=own[0], client_model=own[1])
        each, loss, mean_upload = self.clients(
            self.axis.of(len(who)), data, key, chosen, client, number
        )
        each = jax.tree.map(
            lambda old, new: old.at[who].set(new),
            (state.client, state.client_model),
            each,
        )
        return self._aggregated(state, mean_upload, *each), loss

    def participants(self, key: Array, number: Array) -> Array:
        """Clients [m] of round `number`, in ascending order."""
        if not self._partial:
            return jnp.arange(self.axis.num_clients)
        draw = prng.at(prng.named(key, "participants"), number)
        order = jax.random.permutation(draw, self.axis.num_clients)
        return jnp.sort(order[: self.clients_per_round])

    @property
    def clients_in_round(self) -> int:
        """How many take part in a round, m."""
        return self.clients_per_round or self.axis.num_clients

    @property
    def _partial(self) -> bool:
        return self.clients_in_round < self.axis.num_clients

    def clients(
        self,
        axis: parallel.ClientAxis,
        data: FederatedDataset,
        key: Array,
        state: ServerState,
        client: Client,
        number: Array,
        total: Array | None = None,
    ) -> tuple[tuple[Tree, Tree], Array, Tree]:
        """States and models of `client` [m, ...], losses [m], mean upload."""
        total = jnp.sum(client.size) if total is None else total

        def update(
            client: Client,
            client_state: Tree,
            shared: Tree,
            images: LabelledImages,
        ) -> tuple[Tree, Tree]:
            model, key, number, total = shared
            trained, loss = self._train(
                client, client_state, model, images, key, number
            )
            upload, client_state = self.algorithm.upload(model, trained, client_state)
            kept = trained if self.keep_models else ()
            weighted = aggregation.weighted(upload, client.size / total)
            return ((client_state, kept), loss), weighted

        (each, loss), mean_upload = axis.map_and_sum(
            update,
            client,
            state.client,
            shared=((state.model, key, number, total),),
            placed=(data.images,),
        )
        return each, loss, mean_upload

    def _train(
        self,
        client: Client,
        client_state: Tree,
        model: ModelState,
        images: LabelledImages,
        key: Array,
        number: Array,
    ) -> tuple[ModelState, Array]:
        algorithm, local = self.algorithm, self.local

        def batch_at(step: Array):
            return training.client_batch(
                client,
                images,
                number * local.steps + step,
                key=key,
                batch_size=local.batch_size,
                augmentation=self.augmentation,
            )

        return training.local_training(
            self.classifier,
            training.sgd(local.learning_rate, local.weight_decay),
            algorithm.receive(model, client_state),
            batch_at,
            local.steps,
            adjust_logits=lambda logits: algorithm.logits(
                logits, client.label_count, number
            ),
            penalty=lambda params: algorithm.penalty(
                params, model.params, client_state
            ),
        )

    def aggregate(
        self, server: Tree, model: ModelState, upload: Tree
    ) -> tuple[Tree, ModelState]:
        """New server state and global model from the mean upload."""
        share = self.clients_in_round / self.axis.num_clients
        return self.algorithm.aggregate(server, model, upload, share)

    def _aggregated(
        self, state: ServerState, upload: Tree, client: Tree, client_model: Tree
    ) -> ServerState:
        server, model = self.aggregate(state.server, state.model, upload)
        return ServerState(model, server, client, client_model)


class HostRounds:
    """`Rounds` whose client states and models stay in host memory, as NumPy arrays.

    One group of clients is on the devices at a time; its results are read back while
    the next one computes. Every device must hold all images.
    """

    def __init__(self, rounds: Rounds) -> None:
        """Jit what runs on the devices."""
        self._rounds = rounds
        self._participants = jax.jit(rounds.participants)
        self._aggregate = jax.jit(rounds.aggregate)

        @jax.jit
        def group(data, key, state, rows, number, total):
            client = trees.take(data.client, rows)
            axis = rounds.axis.of(len(rows))
            return rounds.clients(axis, data, key, state, client, number, total)

        self._group = group

    def run(
        self, data: FederatedDataset, key: Array, state: ServerState, number: int
    ) -> tuple[ServerState, np.ndarray]:
        """`Rounds.run`; changes `state.client` and `state.client_model` in place."""
        axis = self._rounds.axis
        who = np.asarray(self._participants(key, number))
        total = np.asarray(data.client.size)[who].sum()
        size = axis.at_once * axis.num_devices
        mean_upload, loss, waiting = None, [], None
        for first in range(0, len(who), size):
            rows = who[first : first + size]
            chosen = state.replace(
                client=axis.replicate(trees.take(state.client, rows)), client_model=()
            )
            each, group_loss, upload = self._group(
                data, key, chosen, rows, number, total
            )
            if waiting is not None:
                loss.append(_store(state, *waiting))
                upload = jax.tree.map(jnp.add, mean_upload, upload)
            mean_upload, waiting = upload, (rows, each, group_loss)
        loss.append(_store(state, *waiting))
        server, model = self._aggregate(state.server, state.model, mean_upload)
        return state.replace(server=server, model=model), np.concatenate(loss)


def _store(state: ServerState, rows: np.ndarray, each: Tree, loss: Array) -> np.ndarray:
    """Write a group's results into the arrays of `state`; returns its losses."""

    def put(old: np.ndarray, new: np.ndarray) -> None:
        old[rows] = new

    jax.tree.map(put, (state.client, state.client_model), jax.device_get(each))
    return np.asarray(loss)
