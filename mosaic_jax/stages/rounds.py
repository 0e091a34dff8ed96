"""Federated rounds: the clients' turns, and the weighted sum of their uploads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT
from mosaic_jax.core.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Teachers,
    Tree,
)
from mosaic_jax.fl import (
    aggregation,
    client_program,
    local_sgd,
    moments,
    parallel,
    training,
    workload,
)
from mosaic_jax.fl.algorithms.base import Algorithm, initial_state
from mosaic_jax.fl.anchors import Anchor, anchored
from mosaic_jax.fl.client_program import ClientProgram, Traffic, Turn
from mosaic_jax.fl.holdings import Group, Holdings
from mosaic_jax.fl.participation import Participation, Turnout
from mosaic_jax.fl.parts import PartsOfNetwork
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.fl.sending import Sending
from mosaic_jax.fl.training import Local
from mosaic_jax.server.base import ServerTraining, Task

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The program of a study's federated rounds.

    With partial participation, or clients of different rates, every device must hold
    all images: see `whole` of `ClientAxis.place`.

    Attributes:
      algorithm: weighs the clients and aggregates their uploads.
      holdings: which part of the network each client holds, and its program.
      local: number and size of a client's minibatches in a round, and its SGD.
      axis: the layout of the clients on the devices.
      augmentation: of the clients' images, a name of `augment.AUGMENTATIONS`.
      keep_models: whether the state keeps each client's trained model.
      clients_per_round: participants, drawn anew each round; 0: all clients.
      server: training on the server after every aggregation; None: there is none.
      task: the properties of the study for `server`; None without it.
      anchor: keeps clients near the model before these rounds; None: nothing does.
      sending: what becomes of uploads on their way to the algorithm.
      mechanism: of a private study; None: it is not private.
    """

    algorithm: Algorithm
    holdings: Holdings
    local: Local
    axis: parallel.ClientAxis
    augmentation: str
    keep_models: bool
    clients_per_round: int = 0
    server: ServerTraining | None = None
    task: Task | None = None
    anchor: Anchor | None = None
    sending: Sending = Sending()
    mechanism: Mechanism | None = None

    def __post_init__(self) -> None:
        """Check that clients of every rate take part in every round.

        Raises:
          ConfigError: none of a rate would.
        """
        for group, count in zip(self.groups, self.participation.counts, strict=True):
            if not count:
                raise errors.ConfigError(
                    f"init.clients_per_round = {self.clients_per_round}: must be"
                    f" larger: no client of rate {group.rate} would take part"
                )

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Clients by rate: those of one rate have networks of one size."""
        return self.holdings.groups

    @functools.cached_property
    def participation(self) -> Participation:
        """Draws the participants of each round."""
        count = self.clients_per_round or self.axis.num_clients
        return Participation(self.groups, count, self.local, self.weight)

    def initial_state(self, model: ModelState, key: jax.Array) -> ServerState:
        """The state before the first round; `key` is that of all rounds."""
        count = self.axis.num_clients
        training = ()
        if self.server is not None and self.task is not None:
            training = self.server.init(self.task, model, prng.named(key, "server"))
        kept = trees.broadcast(model, count) if self.keep_models else ()
        state = initial_state(self.algorithm, model, count)
        near = () if self.anchor is None else model
        error = self.sending.no_error(self.algorithm, model, count)
        return state.replace(
            client_model=kept,
            training=training,
            anchor=near,
            error=error,
            clip=self.sending.first_clip(),
        )

    def run(
        self, data: FederatedDataset, key: jax.Array, state: ServerState, number: Array
    ) -> tuple[ServerState, Array, Metrics]:
        """Round `number`, a pure function.

        Args:
          data: of all clients.
          key: random key of all rounds.
          state: after the round before.
          number: [] int32, number of the round, over the study.

        Returns:
          The new state; the mean loss [m] of each of m participants, NaN if it
          diverged; and metrics: those of the server's training, and `DIVERGED_CLIENT`,
          the number of the first client that diverged or -1.
        """
        everyone = len(self.groups) == 1 and self.participation.everyone
        turnout = self.participation.turnout(data.client, key, number)
        parts = []
        for group, who in zip(self.groups, turnout.participants, strict=True):
            axis, client = self.axis, data.client
            client_state = state.client, state.error
            if not everyone:
                axis = self.axis.of(len(who))
                client, client_state = trees.take((client, client_state), who)
            parts.append(
                self.clients(
                    axis,
                    data,
                    key,
                    self.sent(state),
                    client,
                    client_state,
                    number,
                    turnout.total,
                    group.rate,
                )
            )
        each, loss, teachers = trees.concatenate([part[:3] for part in parts])
        upload = self.joined([part[3] for part in parts])
        who = turnout.who
        if self.sending.colludes:
            numbers = data.client.number[who]
            upload, each, teachers = self._colluded(
                state.model, numbers, key, number, upload, each, teachers
            )
        old = state.client, state.error, state.client_model
        last_round = state.last_round
        now = number
        if turnout.arrived is not None:
            each = jax.vmap(trees.select)(turnout.arrived, each, trees.take(old, who))
            now = jnp.where(turnout.arrived, number, last_round[who])
        if not everyone:
            each = jax.tree.map(lambda old, new: old.at[who].set(new), old, each)
        last_round = jnp.asarray(last_round).at[who].set(now)
        client, error, client_model = each
        state = state.replace(
            client=client,
            error=error,
            client_model=client_model,
            last_round=last_round,
        )
        state, metrics = self.finish(state, upload, teachers, key, number, turnout)
        return state, loss, metrics | {DIVERGED_CLIENT: first_diverged(loss, who)}

    def sent(self, state: ServerState) -> tuple[ModelState, Tree, Tree, Tree, Tree]:
        """What clients get: model, server's state, its method's lesson, anchor, clip.

        All but the model are empty where the algorithm, the method, the stage or the
        study has none.
        """
        server, lesson = {}, {}
        if self.algorithm.sends_state:
            server = state.server
        if self.server is not None and self.server.teaches_clients:
            lesson = self.server.lesson(state.training)
        anchor = {} if self.anchor is None else state.anchor
        return state.model, server, lesson, anchor, state.clip

    def program(self, rate: float) -> ClientProgram:
        """What a client of the group of this `rate` does in a round."""
        program = anchored(self.holdings.program(rate, self.local), self.anchor)
        program = local_sgd.with_mechanism(program, self.mechanism)
        teacher = self.server
        if teacher is not None and self.task is not None and teacher.teaches_clients:
            penalty = functools.partial(teacher.penalty, self.task)
            program = local_sgd.with_lesson(program, penalty)
        return self.sending.around(program)

    @property
    def is_private(self) -> bool:
        """Whether clients hide images, or themselves, and so keep their losses."""
        return self.mechanism is not None or self.sending.private is not None

    def weight(self, size: Array) -> Array:
        """Weights of clients with `size` images in every mean over clients.

        Those of the algorithm, but of private clients all alike: none may move the mean
        further than another.
        """
        if self.sending.private is None:
            return self.algorithm.weight(size)
        return jnp.ones_like(size, jnp.float32)

    def joined(self, parts: list[Tree]) -> Tree:
        """The uploads of several batches of clients: their sum, or all of them."""
        if self.sending.needs_each:
            return trees.concatenate(parts)
        return functools.reduce(trees.add, parts)

    def clients(
        self,
        axis: parallel.ClientAxis,
        data: FederatedDataset,
        key: jax.Array,
        sent: tuple[ModelState, Tree, Tree, Tree, Tree],
        client: Client,
        client_state: Tree,
        number: Array,
        total: Array,
        rate: float = 1.0,
    ) -> tuple[tuple[Tree, Tree, Tree], Array, Tree, Tree]:
        """The turns of m clients of one group in a round.

        Args:
          axis: the layout of these clients.
          data: of all clients.
          key: random key of all rounds.
          sent: the result of `sent`.
          client: these clients, leaves [m, ...].
          client_state: their states, and what compression left out of their uploads,
            leaves [m, ...].
          number: [] int32, number of the round, over the study.
          total: [] sum of the weights of all participants of the round.
          rate: of the group, in (0, 1].

        Returns:
          The clients' new states, what compression left out of their uploads, and their
          models where these are kept; losses [m]; what `Teachers` are made of; and the
          clients' part of the mean upload, or their uploads [m, ...] where the server
          needs each. Models and uploads have the shapes of the global model.
        """
        program = self.program(rate)

        def update(
            client: Client, client_state: Tree, shared: Tree, images: LabelledImages
        ) -> tuple[Tree, Tree]:
            (model, server, *told), key, number, total = shared
            done = workload.steps_done(self.local, client, key, number)
            batch_at = training.client_batches(
                client,
                images,
                number * workload.planned_steps(self.local, client.size),
                workload.most_steps(self.local, client.index.shape[-1]),
                key=key,
                batch_size=self.local.batch_size,
                augmentation=self.augmentation,
                count=done,
                mechanism=self.mechanism,
            )
            own, error = client_state
            kept = own, number, key, self.local
            turn = Turn(model, server, client, *kept, *told, done=done, error=error)
            result, loss = client_program.run(program, turn, batch_at, turn.steps)
            # The loss of a client whose models are not finite marks it as diverged.
            finite = trees.all_finite((result.model, result.state))
            loss = jnp.where(finite, loss, jnp.nan)
            kept = result.model if self.keep_models else ()
            teachers, weight = (), self.weight(client.size) / total
            if self.server is not None:
                used = workload.labels_used(
                    self.local, client, images.label, key, number
                )
                teachers = result.model, used, client.number
            if self.local.failures:
                arrives = workload.arrives(self.local, client, key, number)
                weight = jnp.where(arrives & (total > 0), weight, 0)
                if teachers:
                    teachers = result.model, jnp.where(arrives, used, 0), client.number
            each = result.state, result.error, kept
            if self.sending.needs_each:
                return (each, loss, teachers, result.upload), ()
            weighted = aggregation.weighted(result.upload, weight)
            return (each, loss, teachers, ()), weighted

        (each, loss, teachers, uploads), mean_upload = axis.map_and_sum(
            update,
            client,
            client_state,
            shared=((sent, key, number, total),),
            placed=(data.images,),
        )
        upload = uploads if self.sending.needs_each else mean_upload
        return each, loss, teachers, upload

    def _colluded(
        self,
        model: ModelState,
        client: Array,
        key: jax.Array,
        number: Array,
        upload: Tree,
        each: tuple[Tree, Tree, Tree],
        teachers: Tree,
    ) -> tuple[Tree, tuple[Tree, Tree, Tree], Tree]:
        """What clients sent, where attackers know each other's updates.

        Args:
          model: global, as it was sent.
          client: [m] int32, numbers of the participants.
          key: random key of all rounds.
          number: [] int32, number of the round, over the study.
          upload: [m, ...] of the participants before the attack.
          each: the first result of `clients`.
          teachers: the third.

        Returns:
          `upload`, `each` and `teachers`, with the attackers' models as they send them.
        """
        hostile = self.sending.attackers(key, client)
        draw = prng.at(prng.named(key, "attack"), number)
        reference = self.algorithm.reference(model)
        upload = self.sending.attacked(upload, reference, hostile, draw)
        read = jax.vmap(self.algorithm.sent_model, (0, None))(upload, model)

        def with_false(models: Tree) -> Tree:
            return jax.vmap(trees.select)(hostile, read, models)

        if self.keep_models:
            each = (*each[:2], with_false(each[2]))
        if teachers:
            teachers = (with_false(teachers[0]), *teachers[1:])
        return upload, each, teachers

    def round_bytes(
        self, image_shape: tuple[int, int, int], clients: Client
    ) -> Traffic:
        """Bytes that all participants of a round send and receive.

        Args:
          image_shape: (H, W, D).
          clients: all clients, leaves [C, ...].
        """
        result = Traffic(0, 0)
        client = jax.eval_shape(lambda each: trees.take(each, 0), clients)
        for group, count in zip(self.groups, self.participation.counts, strict=True):
            result += count * self.client_bytes(group.rate, image_shape, client)
        return result

    def client_bytes(
        self, rate: float, image_shape: tuple[int, int, int], client: Client
    ) -> Traffic:
        """Bytes that a client sends and gets in a round.

        Args:
          rate: of its group, in (0, 1].
          image_shape: (H, W, D).
          client: the client, or its shapes.
        """
        program = self.sending.around(self.holdings.program(rate, self.local))
        return program.traffic(image_shape, client)

    def query_bytes(self, image_shape: tuple[int, int, int]) -> Traffic:
        """Bytes of recalibrating a model: sent to all clients, who return moments."""
        init = functools.partial(self.holdings.classifier.init, image_shape=image_shape)
        model = jax.eval_shape(init, jax.eval_shape(prng.root, 0))
        each = Traffic(trees.num_bytes(model.batch_stats), trees.num_bytes(model))
        return self.axis.num_clients * each

    def usable(
        self, data: FederatedDataset, key: jax.Array, model: ModelState
    ) -> ModelState:
        """The global model, its batch-norm recalibrated where the algorithm needs it.

        Args:
          data: of all clients.
          key: random key of all rounds.
          model: the global model.
        """
        if not self.holdings.recalibrates:
            return model
        return self.recalibrate_batch_norm(data, key, model, data.client.size)

    def recalibrate_batch_norm(
        self,
        data: FederatedDataset,
        key: jax.Array,
        model: ModelState,
        weight: Array,
        rate: float = 1.0,
    ) -> ModelState:
        """A model whose batch-norm statistics are means over the clients' batches.

        Source: static batch-norm of HeteroFL (Diao et al., 2021). Every client passes
        the minibatches of a round through the model and sends the mean and variance of
        each layer's input.

        Args:
          data: of all clients.
          key: random key of all rounds.
          model: the part of the network for `rate`.
          weight: [C] float32, of the clients in the mean; not all 0.
          rate: fraction of the network's channels, in (0, 1].
        """
        classifier = self.holdings.classifier
        if isinstance(self.holdings, PartsOfNetwork):
            classifier = self.holdings.classifier_of(rate, scaled=False)
        return moments.of_clients(
            classifier,
            self.axis,
            data,
            key,
            model,
            weight,
            local=self.local,
            augmentation=self.augmentation,
        )

    def finish(
        self,
        state: ServerState,
        upload: Tree,
        teachers: Tree,
        key: jax.Array,
        number: Array,
        turnout: Turnout,
    ) -> tuple[ServerState, Metrics]:
        """Aggregate the uploads, then train on the server if there is such training.

        Where none of the uploads arrives, the server is left as it was.

        Args:
          state: with the clients' new states.
          upload: weighted mean of the uploads of all participants, or all of them.
          teachers: the participants' models [m, ...], labels used [m, K], numbers [m].
          key: random key of all rounds.
          number: [] int32, number of the round, over the study.
          turnout: of the round.

        Returns:
          The new state, and metrics of the training on the server.
        """
        before, sending, arrived = state, self.sending, turnout.arrived
        if sending.needs_each:
            upload = sending.rule.combine(upload, turnout.weight, sending.withstands)
        if sending.private is not None:
            upload, clip = self._revealed(state, upload, key, number, turnout)
            state = state.replace(clip=clip)
        upload = self.holdings.combine(upload, state.model)
        server, model = self.algorithm.aggregate(
            state.server, state.model, upload, turnout.share
        )
        state = state.replace(server=server, model=model)
        if self.server is None or self.task is None:
            return self._unless_lost(state, before, arrived), {}
        training, model, metrics = self.server.train(
            self.task,
            state.training,
            model,
            Teachers(*teachers),
            prng.at(prng.named(key, "server"), number),
            number,
        )
        state = state.replace(model=model, training=training)
        return self._unless_lost(state, before, arrived), metrics

    def _revealed(
        self,
        state: ServerState,
        upload: Tree,
        key: jax.Array,
        number: Array,
        turnout: Turnout,
    ) -> tuple[Tree, Array]:
        """The mean upload that the algorithm may see, and the next round's clip."""
        assert self.sending.private is not None
        count = jnp.float32(self.participation.count)
        if turnout.arrived is not None:
            count = jnp.maximum(jnp.sum(turnout.arrived), 1).astype(jnp.float32)
        draw = prng.at(prng.named(key, "privacy"), number)
        reference = self.algorithm.reference(state.model)
        return self.sending.private.read(upload, reference, state.clip, count, draw)

    def _unless_lost(
        self, state: ServerState, before: ServerState, arrived: Array | None
    ) -> ServerState:
        """`state`, or the one before where no upload has arrived."""
        if arrived is None:
            return state
        kept = ("server", "model", "training", "clip")
        new, old = ({n: getattr(one, n) for n in kept} for one in (state, before))
        return state.replace(**trees.select(jnp.any(arrived), new, old))


def first_diverged(loss: Array, number: Array) -> Array:
    """Number [] int32 of the first of m clients whose loss is not finite; -1: none."""
    bad = ~jnp.isfinite(loss)
    first = jnp.asarray(number)[jnp.argmax(bad)]
    return jnp.where(jnp.any(bad), first, -1).astype(jnp.int32)
