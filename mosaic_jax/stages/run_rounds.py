"""Training in federated rounds, as stages do it, and the evaluation after it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, trees
from mosaic_jax.core.steps import (
    ROUND,
    Metrics,
    OnHost,
    Repeated,
    Run,
    Step,
    Steps,
)
from mosaic_jax.core.types import (
    Array,
    Client,
    ClientModels,
    ModelState,
    ServerState,
    Tree,
)
from mosaic_jax.fl import training, workload
from mosaic_jax.fl.anchors import Anchor
from mosaic_jax.fl.parts import PartsOfNetwork
from mosaic_jax.fl.training import Local
from mosaic_jax.stages import federation, own_models
from mosaic_jax.stages.base import Context, Outcome, accuracies, assess
from mosaic_jax.stages.gathering import Gathering
from mosaic_jax.stages.host_rounds import IN_HOST, HostRounds
from mosaic_jax.stages.rounds import Rounds


def train(
    context: Context,
    stage: str,
    model: ModelState,
    rounds: int,
    local: Local,
    *,
    first: int,
    round_state: Tree = None,
    client_models: ClientModels | None = None,
    anchor: Anchor | None = None,
) -> Run:
    """Run the rounds of a stage.

    It changes no batch, random draw or state where one stage of rounds ends and the
    next one begins.

    Args:
      context: of the stage.
      stage: name of the stage, and of its model in tables.
      model: the global model before the first round.
      rounds: number of rounds.
      local: settings of the clients' SGD.
      first: number of the first round, over the study.
      round_state: the artifact of the stage of rounds before; None: there is none.
      client_models: likewise, where the study keeps them.
      anchor: keeps clients near `model` in all rounds; None: nothing does.

    Returns:
      The stage's `Outcome`.

    Raises:
      ConfigError: a group of clients that hold parts of one size has no participant.
    """
    settings = context.settings
    program = federation.build(
        context,
        local,
        keep_models="client_models" in context.provides,
        server=context.server if context.trains_every_round else None,
        anchor=anchor,
    )
    gatherer = None
    if "gathered" in context.provides:
        gatherer = Gathering(context, program, rounds, first)
    key = federation.rounds_key(settings)
    state = program.initial_state(model, key)
    if round_state is not None:
        state = state.replace(**round_state)
    if client_models is not None:
        state = state.replace(client_model=client_models.model)
    if context.state_on_host:
        kept = {name: jax.device_get(getattr(state, name)) for name in IN_HOST}
        state = state.replace(**kept)
        work = OnHost(_round_on_host(context, program, gatherer))
    else:
        work = Repeated(_round(program, gatherer), mean=False)
    sizes = context.data.clients.client.size
    images = workload.mean_steps(local, sizes) * local.batch_size
    steps = Steps(
        ROUND,
        work,
        (context.clients, context.held_out, key, jnp.asarray(first)),
        (state, gatherer.empty() if gatherer else ()),
        rounds,
        every=settings.evaluation.every,
        samples_per_step=round(program.participation.count * images),
        measure=_measure(context, program),
        # Private batches have rows by each seed's own clients.
        together=context.mechanism is None,
    )
    state, room = yield steps
    up, down = traffic(context, program, steps.done, first=first)
    usable = programs.jit(program.usable)(context.clients, key, state.model)
    state = state.replace(model=usable)
    digests = shared_digests(context, model, key) if first == 0 else {}
    outcome = evaluated(context, program, stage, state, last=first + steps.done - 1)
    if gatherer:
        gathered = gatherer.gathered(room)
        outcome.artifacts["gathered"] = gathered
        for sent, further in zip((up, down), gatherer.traffic(gathered), strict=True):
            sent |= {name: sent.get(name, 0) + n for name, n in further.items()}
    return dataclasses.replace(
        outcome,
        results={**digests, **outcome.results, **steps.stopped},
        up=up,
        down=down,
    )


def evaluated(
    context: Context, program: Rounds, stage: str, state: ServerState, *, last: int
) -> Outcome:
    """Artifacts and evaluation of the state after round `last`.

    Args:
      context: of the stage.
      program: of the rounds.
      stage: name of the stage, and of its model in tables.
      state: its model as it is to be used.
      last: number of the round, over the study.
    """
    artifacts: dict[str, Tree] = {
        "global_model": state.model,
        "round_state": federation.round_state(state),
    }
    if "client_models" in context.provides:
        artifacts["client_models"] = own_models.client_models(context, state)
    assessed = assess(context, context.classifier.logits, state.model)
    key = federation.rounds_key(context.settings)
    results = own_models.results_by_rate(context, program, state.model, key, last)
    never = np.asarray(state.last_round) < 0
    results["never_trained"] = context.data.clients.client.number[never].tolist()
    own = own_models.accuracies(context, state, artifacts.get("client_models"))
    personal = {}
    if context.algorithm.personal:
        # Clients that never trained have no models of their own, unless nobody has.
        trained = ~never | never.all()
        mean = float(np.mean(np.asarray(own)[trained]))
        personal["personal"] = {"test_accuracy": mean}
    # What a study of the clients' own models ends with are these alone.
    final = {"final": assessed} if context.algorithm.has_global_model else {}
    return Outcome(
        artifacts=artifacts,
        models={stage: assessed, **final, **personal},
        results=results,
        clients=own_models.report_columns(context, stage, own),
    )


def traffic(
    context: Context, program: Rounds, rounds: int, *, first: int = 0
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that clients send and receive in `rounds` rounds.

    The recalibration of batch-norm after the last round is included, as the stage's
    model needs it. That before evaluations within the stage is not: these belong to
    the simulation, not to the method.

    Args:
      context: of the stage.
      program: of the rounds.
      rounds: number of rounds.
      first: number of the first round, over the study.

    Returns:
      Bytes up and bytes down by payload, of all clients together.
    """
    shape = context.data.info.image_shape
    sent = rounds * program.round_bytes(shape, context.clients.client)
    up, down = {"models": sent.up}, {"models": sent.down}
    lost = np.zeros(len(program.groups), int)
    if program.local.failures:
        lost = _lost_uploads(context, program, rounds, first)
        up["models"] -= _bytes_of(context, program, lost)
    if program.holdings.recalibrates:
        query = program.query_bytes(shape)
        up["moments"], down["queried_models"] = query.up, query.down
    if program.server is not None:
        # Each client tells how many images of each class it used in the round.
        count = context.data.info.num_classes * np.dtype(np.float32).itemsize
        arrived = rounds * program.participation.count - int(lost.sum())
        up["used_label_counts"] = arrived * count
        if program.server.teaches_clients:
            lesson = _lesson_bytes(program, shape)
            down["lessons"] = rounds * program.participation.count * lesson
    if count := _anchor_bytes(context, program, rounds, first):
        down["anchor"] = count
    return up, down


def _lost_uploads(
    context: Context, program: Rounds, rounds: int, first: int
) -> np.ndarray:
    """Number of uploads of each group, [G] int, that do not arrive."""
    participation = program.participation
    client, key = context.clients.client, federation.rounds_key(context.settings)
    arrived = jax.vmap(
        lambda number: participation.turnout(client, key, number).arrived
    )(first + jnp.arange(rounds))
    lost = np.sum(~np.asarray(arrived), axis=0)
    ends = np.cumsum(participation.counts)[:-1]
    return np.array([count.sum() for count in np.split(lost, ends)])


def _bytes_of(context: Context, program: Rounds, uploads: np.ndarray) -> int:
    """Bytes of so many uploads of each group, [G] int."""
    shape = context.data.info.image_shape
    client = trees.take(context.clients.client, 0)
    each = [
        program.client_bytes(group.rate, shape, client).up for group in program.groups
    ]
    return int(sum(count * up for count, up in zip(uploads, each, strict=True)))


def _anchor_bytes(context: Context, program: Rounds, rounds: int, first: int) -> int:
    """Of the model that clients stay near, where it is not that of the first round.

    A client that holds the whole network keeps it, and so gets it once: with the first
    round, whose model it is, or when it first takes part after that. Parts, which are
    others in every round, come with every round's model.
    """
    if program.anchor is None:
        return 0
    shape, clients = context.data.info.image_shape, context.clients.client
    if isinstance(program.holdings, PartsOfNetwork):
        return (rounds - 1) * program.round_bytes(shape, clients).down
    key = federation.rounds_key(context.settings)
    (drawn,) = jax.vmap(program.participation.participants, (None, 0))(
        key, first + jnp.arange(rounds)
    )
    late = np.setdiff1d(drawn, drawn[0])
    model = jax.eval_shape(
        functools.partial(program.holdings.classifier.init, image_shape=shape), key
    )
    return len(late) * trees.num_bytes(model)


def _lesson_bytes(program: Rounds, image_shape: tuple[int, int, int]) -> int:
    """Of what the method on the server sends each client along with the model."""

    def lesson(key: jax.Array) -> Tree:
        model = program.holdings.classifier.init(key, image_shape)
        return program.sent(program.initial_state(model, key))[2]

    return trees.num_bytes(jax.eval_shape(lesson, jax.eval_shape(prng.root, 0)))


def shared_digests(
    context: Context, model: ModelState, key: jax.Array
) -> dict[str, str]:
    """Digests of what all methods of a comparison must have in common.

    Args:
      context: of the stage.
      model: the global model before the first round.
      key: random key of all rounds.
    """
    local = context.settings.local

    @programs.jit
    def order(client: Client, key: jax.Array) -> Array:
        def client_order(client: Client) -> Array:
            length = workload.most_steps(local, client.index.shape[-1])
            return training.client_rows(
                client, 0, length, key=key, batch_size=local.batch_size
            )[0]

        return jax.vmap(client_order)(client)

    client = context.data.clients.client
    return {
        "initial_params_sha256": trees.digest(jax.device_get(model)),
        "batch_order_sha256": trees.digest(jax.device_get(order(client, key))),
    }


def _round(program: Rounds, gatherer: Gathering | None) -> Step:
    """A round as a step of a loop.

    Its state is that of the rounds and the room for what is gathered, () for nothing.
    The number of the stage's first round is an argument, so that stages of rounds share
    one compiled program.
    """

    def step(args: Tree, state: Tree, number: Array) -> tuple[Tree, Metrics]:
        data, _, key, offset = args
        state, room = state
        if gatherer:
            model, now = state.model, offset + number
            room = gatherer.add(room, data, key, model, now, number)
        state, loss, metrics = program.run(data, key, state, offset + number)
        return (state, room), _with_loss(program, jnp.mean(loss), metrics)

    return step


def _round_on_host(
    context: Context, program: Rounds, gatherer: Gathering | None
) -> Step:
    """`_round` for studies whose clients' states or images stay in host memory."""
    on_host = HostRounds(program, context.in_host)
    add = programs.jit(gatherer.add, donate_argnums=0) if gatherer else None

    def step(args: Tree, state: Tree, number: int) -> tuple[Tree, Metrics]:
        data, _, key, offset = args
        state, room = state
        now = int(offset) + number
        if add:
            room = add(room, data, key, state.model, now, number)
        state, loss, metrics = on_host.run(data, key, state, now)
        return (state, room), _with_loss(program, loss.mean(), metrics)

    return step


def _with_loss(program: Rounds, loss: Array, metrics: Metrics) -> Metrics:
    """Metrics of a round; in private studies clients keep their losses."""
    return metrics if program.is_private else {"loss": loss, **metrics}


def _measure(context: Context, program: Rounds) -> Callable[[Tree, Tree], Metrics]:
    """Accuracies of the global model at the end of a window of rounds."""

    def evaluate(
        data: Tree, key: jax.Array, model: ModelState, held_out: Tree
    ) -> Metrics:
        model = program.usable(data, key, model)
        return accuracies(
            lambda x: context.classifier.logits(model, x),
            held_out,
            context.settings.evaluation.batch_size,
        )

    if context.state_on_host:
        evaluate = programs.jit(evaluate)

    def measure(args: Tree, state: Tree) -> Metrics:
        data, held_out, key, _ = args
        return evaluate(data, key, state[0].model, held_out)

    return measure
