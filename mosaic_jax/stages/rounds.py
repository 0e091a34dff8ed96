"""Federated rounds: who takes part, local training, aggregation, server training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import aggregation, errors, parallel, prng, training, trees
from mosaic_jax.algorithms import ALGORITHMS
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.distillation.base import ServerTraining, Task
from mosaic_jax.loop import DIVERGED_CLIENT
from mosaic_jax.models import norm, submodel
from mosaic_jax.provenance import View
from mosaic_jax.settings import Local, Settings
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.parts import Group, Parts
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
class Traffic:
    """Bytes from clients to server, and from server to clients."""

    up: int
    down: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.up + other.up, self.down + other.down)

    def __rmul__(self, count: int) -> "Traffic":
        return Traffic(count * self.up, count * self.down)


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
      clients_per_round: drawn anew each round; 0: all of them.
      server: trains the aggregate, on `task`; None: nobody does.
      rates: of each client, where the algorithm is partial, else empty.

    Where not everyone takes part or rates differ, `axis.place` must have put whole
    images on every device.
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
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that every group has clients in every round.

        Raises:
          ConfigError: a group has none.
        """
        for group, count in zip(self.groups, self.counts, strict=True):
            if not count:
                raise errors.ConfigError(
                    f"init.clients_per_round = {self.clients_per_round}: must be"
                    f" larger: no client of rate {group.rate} would take part"
                )

    @functools.cached_property
    def parts(self) -> Parts:
        """Of the network, and who holds which."""
        rates = self.rates or (1.0,) * self.axis.num_clients
        return Parts(self.classifier, self.algorithm, rates)

    @property
    def groups(self) -> list[Group]:
        """Clients of one rate: batched together, as networks of their own size."""
        return self.parts.groups

    def initial_state(self, model: ModelState, key: Array) -> ServerState:
        """State before the first round."""
        count = self.axis.num_clients
        kept = trees.broadcast(model, count) if self.keep_models else ()
        return ServerState(
            model=model,
            server=self.algorithm.init_server(model),
            client=trees.broadcast(self.algorithm.init_client(model), count),
            last_round=jnp.full(count, -1, jnp.int32),
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
          server's training and the first client that diverged.
        """
        everyone = len(self.groups) == 1 and not self._some
        participants = self.participants(key, number)
        total = self.total_weight(data, participants)
        parts = []
        for group, who in zip(self.groups, participants, strict=True):
            axis, client, client_state = self.axis, data.client, state.client
            if not everyone:
                axis = self.axis.of(len(who))
                client, client_state = trees.take((client, client_state), who)
            parts.append(
                self.clients(
                    axis,
                    data,
                    key,
                    state.model,
                    client,
                    client_state,
                    number,
                    total,
                    group.rate,
                )
            )
        each, loss, taught = trees.concatenate([part[:3] for part in parts])
        upload = functools.reduce(trees.add, [part[3] for part in parts])
        who = jnp.concatenate(participants)
        if not everyone:
            old = (state.client, state.client_model)
            each = jax.tree.map(lambda old, new: old.at[who].set(new), old, each)
        last_round = state.last_round.at[who].set(number)
        state = state.replace(
            client=each[0], client_model=each[1], last_round=last_round
        )
        state, metrics = self.finish(state, upload, taught, key, number)
        return state, loss, metrics | {DIVERGED_CLIENT: first_diverged(loss, who)}

    def participants(self, key: Array, number: Array) -> list[Array]:
        """Clients of round `number`, of each group, in ascending order."""
        if not self._some:
            return [jnp.asarray(group.members) for group in self.groups]
        draw = prng.at(prng.named(key, "participants"), number)
        return [
            jnp.sort(jax.random.permutation(prng.at(draw, i), group.members)[:count])
            for i, (group, count) in enumerate(
                zip(self.groups, self.counts, strict=True)
            )
        ]

    @property
    def clients_in_round(self) -> int:
        """How many take part in a round, m."""
        return self.clients_per_round or self.axis.num_clients

    @property
    def counts(self) -> list[int]:
        """How many of each group take part: its share, rounded along the groups."""
        share = self.clients_in_round / self.axis.num_clients
        ends = np.cumsum([len(group.members) for group in self.groups]) * share
        return np.diff(np.rint(ends).astype(int), prepend=0).tolist()

    @property
    def _some(self) -> bool:
        return self.clients_in_round < self.axis.num_clients

    def total_weight(self, data: FederatedDataset, participants: list[Array]) -> Array:
        """[] float32, of those who take part."""
        weight = self.algorithm.weight(data.client.size)
        return sum(jnp.sum(weight[who]) for who in participants)

    def clients(
        self,
        axis: parallel.ClientAxis,
        data: FederatedDataset,
        key: Array,
        model: ModelState,
        client: Client,
        client_state: Tree,
        number: Array,
        total: Array,
        rate: float = 1.0,
    ) -> tuple[tuple[Tree, Tree], Array, Tree, Tree]:
        """What clients [m, ...] of one group do, who are part of the weight `total`.

        Returns:
          Their states and kept models, losses [m], what the server's training reads of
          each, and their part of the mean upload. Models and uploads are wide.
        """
        held = self.parts
        narrow = held.classifier_of(rate)

        def update(
            client: Client,
            client_state: Tree,
            shared: Tree,
            images: LabelledImages,
        ) -> tuple[Tree, Tree]:
            whole, key, number, total = shared
            channels = held.channels(key, number, client.number, rate)
            model = held.cut(whole, channels)
            trained, loss = self._train(
                narrow, client, client_state, model, images, key, number
            )
            # A client that is no longer finite is told by its loss.
            loss = jnp.where(trees.all_finite(trained), loss, jnp.nan)
            upload, client_state = self.algorithm.upload(model, trained, client_state)
            trained = held.paste(trained, channels)
            if self.algorithm.partial:
                share = held.share(whole, client, key, number, rate)
                upload = held.paste(upload, channels)
                upload = submodel.Part(submodel.within(upload, share), share)
            kept = trained if self.keep_models else ()
            taught = ()
            if self.server is not None:
                used = self._used(client, images.label, key, number)
                taught = trained, used, client.number
            weight = self.algorithm.weight(client.size) / total
            weighted = aggregation.weighted(upload, weight)
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
        classifier: Classifier,
        client: Client,
        client_state: Tree,
        model: ModelState,
        images: LabelledImages,
        key: Array,
        number: Array,
    ) -> tuple[ModelState, Array]:
        """Trained model and mean loss."""
        algorithm, local = self.algorithm, self.local

        batch_at = training.client_batches(
            client,
            images,
            number * local.steps,
            local.steps,
            key=key,
            batch_size=local.batch_size,
            augmentation=self.augmentation,
        )
        return training.local_training(
            classifier,
            training.sgd(local.learning_rate, local.weight_decay),
            algorithm.receive(model, client_state),
            batch_at,
            local.steps,
            statistics=algorithm.batch_stats,
            adjust_logits=lambda logits: algorithm.logits(
                logits, client.label_count, number
            ),
            penalty=lambda params: algorithm.penalty(
                params, model.params, client_state
            ),
        )

    def _used(self, client: Client, label: Array, key: Array, number: Array) -> Array:
        """How many images of each class [K] a client uses in round `number`."""
        rows, mask = training.client_rows(
            client,
            number * self.local.steps,
            self.local.steps,
            key=key,
            batch_size=self.local.batch_size,
        )
        held = jax.nn.one_hot(label[rows], len(client.label_count))
        return jnp.sum(held * mask[..., None], axis=(0, 1))

    def round_bytes(self, image_shape: tuple[int, int, int]) -> Traffic:
        """What the clients of a round send and receive, by the arrays that cross."""
        result = Traffic(0, 0)
        for group, count in zip(self.groups, self.counts, strict=True):
            whole, model = (
                self._shapes(rate, image_shape) for rate in (1.0, group.rate)
            )
            state = jax.eval_shape(self.algorithm.init_client, whole)
            upload, _ = jax.eval_shape(self.algorithm.upload, model, model, state)
            each = Traffic(trees.num_bytes(upload), trees.num_bytes(model))
            result += count * each
        return result

    def query_bytes(self, image_shape: tuple[int, int, int]) -> Traffic:
        """Of one whole model that all clients get, and the moments they answer with."""
        model = self._shapes(1.0, image_shape)
        each = Traffic(trees.num_bytes(model.batch_stats), trees.num_bytes(model))
        return self.axis.num_clients * each

    def _shapes(self, rate: float, image_shape: tuple[int, int, int]) -> ModelState:
        narrow = self.parts.classifier_of(rate)
        return jax.eval_shape(lambda: narrow.init(prng.root(0), image_shape))

    def settled(self, data: FederatedDataset, key: Array, model: ModelState) -> Tree:
        """The global model with statistics to use it by: where the algorithm queries
        clients for these, by their answers.
        """
        if not self.algorithm.queries:
            return model
        return self.queried(data, key, model, data.client.size)

    def queried(
        self,
        data: FederatedDataset,
        key: Array,
        model: ModelState,
        weight: Array,
        rate: float = 1.0,
    ) -> ModelState:
        """A model with the mean of its moments on the clients' batches.

        As HeteroFL's static batch-norm (Diao et al., 2021): every client passes
        `local_steps` minibatches through the model and sends each layer's mean and
        variance.

        Args:
          data: of all clients.
          key: of all rounds.
          model: of rate `rate`, cut.
          weight: [C], not all 0, of the clients' answers.
          rate: share of the network's channels.
        """
        classifier = self.parts.classifier_of(rate, scaled=False)

        def one(client: Client, weight: Array, shared: Tree, images: LabelledImages):
            model, key, total = shared
            batch_at = training.client_batches(
                client,
                images,
                0,
                self.local.steps,
                key=key,
                batch_size=self.local.batch_size,
                augmentation=self.augmentation,
            )

            def step(number: Array, found: Tree) -> Tree:
                batch = batch_at(number)
                _, blended = classifier.train_logits(
                    model.replace(batch_stats=found), batch.image, batch.mask
                )
                return jax.tree.map(
                    lambda old, new: norm.cumulative(old, new, number), found, blended
                )

            found = jax.lax.fori_loop(0, self.local.steps, step, model.batch_stats)
            return (), jax.tree.map(lambda leaf: leaf * (weight / total), found)

        weight = jnp.asarray(weight, jnp.float32)
        _, statistics = self.axis.map_and_sum(
            one,
            data.client,
            weight,
            shared=((model, key, jnp.sum(weight)),),
            placed=(data.images,),
        )
        return model.replace(batch_stats=statistics)

    def finish(
        self, state: ServerState, upload: Tree, taught: Tree, key: Array, number: Array
    ) -> tuple[ServerState, Metrics]:
        """Aggregate the mean upload, train on the server."""
        share = self.clients_in_round / self.axis.num_clients
        if self.algorithm.partial:
            upload = submodel.merge(upload, state.model)
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


def first_diverged(loss: Array, number: Array) -> Array:
    """[] int32, of `number` [m] the first whose loss [m] is not finite; -1 if none."""
    bad = ~jnp.isfinite(loss)
    first = jnp.asarray(number)[jnp.argmax(bad)]
    return jnp.where(jnp.any(bad), first, -1).astype(jnp.int32)


def build(
    context: Context,
    local: Local,
    *,
    keep_models: bool = False,
    server: ServerTraining | None = None,
) -> Rounds:
    """The rounds of a study, with clients' steps by `local`."""
    settings = context.settings
    return Rounds(
        classifier=context.classifier,
        algorithm=context.algorithm,
        local=local,
        axis=context.axis,
        augmentation=context.data.info.augmentation,
        keep_models=keep_models,
        clients_per_round=settings.init.clients_per_round,
        server=server,
        task=context.task if server else None,
        rates=context.rates,
    )


def reads(study: Settings) -> tuple[str, ...]:
    """What a stage must declare that calls `build`."""
    return ("init", "local", *holdings(study))


def holdings(study: Settings) -> tuple[str, ...]:
    """What a stage must declare that asks which part of the network clients hold."""
    partial = ALGORITHMS[study.init.method].partial
    return ("init.method", *(("init.rounds", "budgets") if partial else ()))


def stream(settings: View) -> Array:
    """The key of all rounds of a study."""
    return prng.named(prng.root(settings.seed), "init")


def held_in(context: Context, model: ModelState, number: int | Array) -> ModelState:
    """Which part of `model` each client [C, ...] trains in round `number`: 1 there.

    `number` may be [C]; -1, of clients that never trained, counts as the latest.
    """
    parts = Parts(context.classifier, context.algorithm, context.rates)
    client, number = context.clients.client, jnp.asarray(number)
    number = jnp.where(number < 0, jnp.max(number), number)
    return parts.share_of_all(model, client, stream(context.settings), number)


def taking_part(last_round: Array, which: str) -> np.ndarray:
    """[C] bool: clients whose models count, by the round each last trained in.

    `which`: "all" that ever trained, or those of the "latest" round.
    """
    last_round = np.asarray(last_round)
    if which == "latest":
        return last_round == last_round.max()
    return last_round >= 0


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

        @functools.partial(jax.jit, static_argnames="rate")
        def group(data, key, model, client_state, rows, number, total, rate):
            client = trees.take(data.client, rows)
            axis = rounds.axis.of(len(rows))
            return rounds.clients(
                axis, data, key, model, client, client_state, number, total, rate
            )

        self._group = group

    def run(
        self, data: FederatedDataset, key: Array, state: ServerState, number: int
    ) -> tuple[ServerState, np.ndarray, Metrics]:
        """`Rounds.run`; changes `state.client` and `state.client_model` in place."""
        axis = self._rounds.axis
        participants = self._participants(key, number)
        total = self._rounds.total_weight(data, participants)
        size = axis.at_once * axis.num_devices
        batches = [
            (np.asarray(who)[first : first + size], group.rate)
            for group, who in zip(self._rounds.groups, participants, strict=True)
            for first in range(0, len(who), size)
        ]
        mean_upload, loss, taught, waiting = None, [], [], None
        for rows, rate in batches:
            client_state = axis.replicate(trees.take(state.client, rows))
            each, group_loss, group_taught, upload = self._group(
                data, key, state.model, client_state, rows, number, total, rate
            )
            taught.append(group_taught)
            if waiting is not None:
                loss.append(_store(state, *waiting))
                upload = trees.add(mean_upload, upload)
            mean_upload, waiting = upload, (rows, each, group_loss)
        loss.append(_store(state, *waiting))
        taught = trees.concatenate(taught)
        on_device = state.replace(client=(), client_model=())
        on_device, metrics = self._finish(on_device, mean_upload, taught, key, number)
        state = on_device.replace(client=state.client, client_model=state.client_model)
        loss, who = np.concatenate(loss), np.concatenate(participants)
        state = state.replace(last_round=state.last_round.at[who].set(number))
        return state, loss, metrics | {DIVERGED_CLIENT: first_diverged(loss, who)}


def _store(state: ServerState, rows: np.ndarray, each: Tree, loss: Array) -> np.ndarray:
    """Write a group's results into the arrays of `state`; returns its losses."""

    def put(old: np.ndarray, new: np.ndarray) -> None:
        old[rows] = new

    jax.tree.map(put, (state.client, state.client_model), jax.device_get(each))
    return np.asarray(loss)
