"""Federated rounds: who takes part, local training, aggregation, server training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import aggregation, parallel, prng, training, trees
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.distillation.base import ServerTraining, Task
from mosaic_jax.settings import Local
from mosaic_jax.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Teachers,
    Tree,
)

Metrics = dict[str, Array]


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
      server: trains the aggregate, on `task`; None: nobody does.
    """

    classifier: Classifier
    algorithm: Algorithm
    local: Local
    axis: parallel.ClientAxis
    augmentation: str
    keep_models: bool
    clients_per_round: int = 0
    server: ServerTraining | None = None
    task: Task | None = None

    def initial_state(self, model: ModelState, key: Array) -> ServerState:
        """State before the first round."""
        count = self.axis.num_clients
        kept = trees.broadcast(model, count) if self.keep_models else ()
        return ServerState(
            model=model,
            server=self.algorithm.init_server(model),
            client=trees.broadcast(self.algorithm.init_client(model), count),
            client_model=kept,
            training=()
            if self.server is None
            else self.server.init(self.task, model, prng.named(key, "server")),
        )

    def run(
        self, data: FederatedDataset, key: Array, state: ServerState, number: Array
    ) -> tuple[ServerState, Array, Metrics]:
        """Round `number`, a pure function.

        Returns:
          The state, the mean loss of each client that took part [m], metrics of the
          server's training.
        """
        axis, client, client_state = self.axis, data.client, state.client
        if self._partial:
            who = self.participants(key, number)
            axis = self.axis.of(len(who))
            client, client_state = trees.take((client, client_state), who)
        each, loss, taught, upload = self.clients(
            axis, data, key, state.model, client, client_state, number
        )
        if self._partial:
            old = (state.client, state.client_model)
            each = jax.tree.map(lambda old, new: old.at[who].set(new), old, each)
        state = state.replace(client=each[0], client_model=each[1])
        state, metrics = self.finish(state, upload, taught, key, number)
        return state, loss, metrics

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
        model: ModelState,
        client: Client,
        client_state: Tree,
        number: Array,
        total: Array | None = None,
    ) -> tuple[tuple[Tree, Tree], Array, Tree, Tree]:
        """What the clients [m, ...] do; `total` images count, by default all of theirs.

        Returns:
          Their states and kept models, losses [m], what the server's training reads of
          each, and the mean upload.
        """
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
            taught = ()
            if self.server is not None:
                taught = trained, self._used(client, images.label, key, number)
            weighted = aggregation.weighted(upload, client.size / total)
            return ((client_state, kept), loss, taught), weighted

        (each, loss, taught), mean_upload = axis.map_and_sum(
            update,
            client,
            client_state,
            shared=((model, key, number, total),),
            placed=(data.images,),
        )
        return each, loss, taught, mean_upload

    def _train(
        self,
        client: Client,
        client_state: Tree,
        model: ModelState,
        images: LabelledImages,
        key: Array,
        number: Array,
    ) -> tuple[ModelState, Array]:
        """Trained model and mean loss."""
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

    def _used(self, client: Client, label: Array, key: Array, number: Array) -> Array:
        """How many images of each class [K] a client uses in round `number`."""

        def counts(step: Array) -> Array:
            rows, mask = training.client_rows(
                client,
                number * self.local.steps + step,
                key=key,
                batch_size=self.local.batch_size,
            )
            held = jax.nn.one_hot(label[rows], len(client.label_count))
            return jnp.sum(held * mask[:, None], axis=0)

        return jnp.sum(jax.vmap(counts)(jnp.arange(self.local.steps)), axis=0)

    def finish(
        self, state: ServerState, upload: Tree, taught: Tree, key: Array, number: Array
    ) -> tuple[ServerState, Metrics]:
        """Aggregate the mean upload, train on the server."""
        share = self.clients_in_round / self.axis.num_clients
        server, model = self.algorithm.aggregate(
            state.server, state.model, upload, share
        )
        state = state.replace(server=server, model=model)
        if self.server is None:
            return state, {}
        training, model, metrics = self.server.train(
            self.task,
            state.training,
            model,
            Teachers(*taught),
            prng.at(prng.named(key, "server"), number),
            number,
        )
        return state.replace(model=model, training=training), metrics


class HostRounds:
    """`Rounds` whose client states and models stay in host memory, as NumPy arrays.

    One group of clients is on the devices at a time; its results are read back while
    the next one computes. Every device must hold all images.
    """

    def __init__(self, rounds: Rounds) -> None:
        """Jit what runs on the devices."""
        self._rounds = rounds
        self._participants = jax.jit(rounds.participants)
        self._finish = jax.jit(rounds.finish)

        @jax.jit
        def group(data, key, model, client_state, rows, number, total):
            client = trees.take(data.client, rows)
            axis = rounds.axis.of(len(rows))
            return rounds.clients(
                axis, data, key, model, client, client_state, number, total
            )

        self._group = group

    def run(
        self, data: FederatedDataset, key: Array, state: ServerState, number: int
    ) -> tuple[ServerState, np.ndarray, Metrics]:
        """`Rounds.run`; changes `state.client` and `state.client_model` in place."""
        axis = self._rounds.axis
        who = np.asarray(self._participants(key, number))
        total = np.asarray(data.client.size)[who].sum()
        size = axis.at_once * axis.num_devices
        mean_upload, loss, taught, waiting = None, [], [], None
        for first in range(0, len(who), size):
            rows = who[first : first + size]
            client_state = axis.replicate(trees.take(state.client, rows))
            each, group_loss, group_taught, upload = self._group(
                data, key, state.model, client_state, rows, number, total
            )
            taught.append(group_taught)
            if waiting is not None:
                loss.append(_store(state, *waiting))
                upload = jax.tree.map(jnp.add, mean_upload, upload)
            mean_upload, waiting = upload, (rows, each, group_loss)
        loss.append(_store(state, *waiting))
        taught = jax.tree.map(lambda *parts: jnp.concatenate(parts), *taught)
        on_device = state.replace(client=(), client_model=())
        on_device, metrics = self._finish(on_device, mean_upload, taught, key, number)
        state = on_device.replace(client=state.client, client_model=state.client_model)
        return state, np.concatenate(loss), metrics


def _store(state: ServerState, rows: np.ndarray, each: Tree, loss: Array) -> np.ndarray:
    """Write a group's results into the arrays of `state`; returns its losses."""

    def put(old: np.ndarray, new: np.ndarray) -> None:
        old[rows] = new

    jax.tree.map(put, (state.client, state.client_model), jax.device_get(each))
    return np.asarray(loss)
