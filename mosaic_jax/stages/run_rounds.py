"""Training in federated rounds, as stages do it, and the evaluation after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, trees
from mosaic_jax.core.steps import DIVERGED_STEP, Chunk, Run, Steps, repeat
from mosaic_jax.core.types import (
    Array,
    Client,
    ClientModels,
    ModelState,
    ServerState,
    Tree,
)
from mosaic_jax.fl import training
from mosaic_jax.fl.training import Local
from mosaic_jax.stages import federation, own_models
from mosaic_jax.stages.base import Context, Outcome, accuracies, assess
from mosaic_jax.stages.host_rounds import HostRounds
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
    )
    up, down = traffic(context, program, rounds)
    key = federation.rounds_key(settings)
    state = program.initial_state(model, key)
    if round_state is not None:
        state = state.replace(**round_state)
    if client_models is not None:
        state = state.replace(client_model=client_models.model)
    if context.state_on_host:
        state = state.replace(
            client=jax.device_get(state.client),
            client_model=jax.device_get(state.client_model),
        )
    state = yield Steps(
        "round",
        (_chunk_on_host if context.state_on_host else _chunk)(context, program),
        (context.clients, context.held_out, key, jnp.asarray(first)),
        state,
        rounds,
        every=settings.evaluation.every,
        samples_per_step=program.clients_in_round * local.steps * local.batch_size,
        on_host=context.state_on_host,
    )
    usable = programs.jit(program.usable)(context.clients, key, state.model)
    state = state.replace(model=usable)
    digests = _shared_digests(context, model, key) if first == 0 else {}
    outcome = _evaluated(context, program, stage, state, last=first + rounds - 1)
    return dataclasses.replace(
        outcome, results={**digests, **outcome.results}, up=up, down=down
    )


def _evaluated(
    context: Context, program: Rounds, stage: str, state: ServerState, *, last: int
) -> Outcome:
    """Artifacts and evaluation of the state after round `last`."""
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
        # Clients that never trained have no models of their own.
        mean = float(np.mean(np.asarray(own)[~never]))
        personal["personal"] = {"test_accuracy": mean}
    return Outcome(
        artifacts=artifacts,
        models={stage: assessed, "final": assessed, **personal},
        results=results,
        clients=own_models.report_columns(context, stage, own),
    )


def traffic(
    context: Context, program: Rounds, rounds: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that clients send and receive in `rounds` rounds.

    The recalibration of batch-norm after the last round is included, as the stage's
    model needs it. That before evaluations within the stage is not: these belong to
    the simulation, not to the method.

    Args:
      context: of the stage.
      program: of the rounds.
      rounds: number of rounds.

    Returns:
      Bytes up and bytes down by payload, of all clients together.
    """
    shape = context.data.info.image_shape
    sent = rounds * program.round_bytes(shape, context.clients.client)
    up, down = {"models": sent.up}, {"models": sent.down}
    if program.holdings.recalibrates:
        query = program.query_bytes(shape)
        up["moments"], down["queried_models"] = query.up, query.down
    if program.server is not None:
        # Each client tells how many images of each class it used in the round.
        count = context.data.info.num_classes * np.dtype(np.float32).itemsize
        up["used_label_counts"] = rounds * program.clients_in_round * count
        if program.server.teaches_clients:
            lesson = _lesson_bytes(program, shape)
            down["lessons"] = rounds * program.clients_in_round * lesson
    return up, down


def _lesson_bytes(program: Rounds, image_shape: tuple[int, int, int]) -> int:
    """Of what the method on the server sends each client along with the model."""

    def lesson(key: jax.Array) -> Tree:
        model = program.holdings.classifier.init(key, image_shape)
        return program.sent(program.initial_state(model, key))[2]

    return trees.num_bytes(jax.eval_shape(lesson, jax.eval_shape(prng.root, 0)))


def _shared_digests(
    context: Context, model: ModelState, key: jax.Array
) -> dict[str, str]:
    """Digests of what all methods of a comparison must have in common."""
    local = context.settings.local

    @programs.jit
    def order(client: Client, key: jax.Array) -> Array:
        def client_order(client: Client) -> Array:
            return training.client_rows(
                client, 0, local.steps, key=key, batch_size=local.batch_size
            )[0]

        return jax.vmap(client_order)(client)

    client = context.data.clients.client
    return {
        "initial_params_sha256": trees.digest(jax.device_get(model)),
        "batch_order_sha256": trees.digest(jax.device_get(order(client, key))),
    }


def _chunk(context: Context, program: Rounds) -> Chunk:
    """Some rounds and an evaluation, one program; metrics are of the last round.

    The number of the stage's first round is an argument, so that stages of rounds share
    one compiled program.
    """

    def chunk(
        args: Tree, state: ServerState, first: Array, end: Array
    ) -> tuple[ServerState, dict[str, Array]]:
        data, held_out, key, offset = args

        def body(number: Array, state: ServerState) -> Tree:
            state, loss, metrics = program.run(data, key, state, offset + number)
            return state, {"loss": jnp.mean(loss), **metrics}

        state, metrics = repeat(body, state, first, end, mean=False)
        model = program.usable(data, key, state.model)
        return state, metrics | _accuracies(context, model, held_out)

    return chunk


def _chunk_on_host(context: Context, program: Rounds) -> Chunk:
    """`_chunk` for studies whose clients' states do not fit on the devices."""
    on_host = HostRounds(program)

    @programs.jit
    def evaluate(
        data: Tree, key: jax.Array, model: ModelState, held_out: Tree
    ) -> dict[str, Array]:
        model = program.usable(data, key, model)
        return _accuracies(context, model, held_out)

    def chunk(
        args: Tree, state: ServerState, first: int, end: int
    ) -> tuple[ServerState, dict[str, Array]]:
        data, held_out, key, offset = args
        for number in range(first, end):
            state, loss, metrics = on_host.run(data, key, state, int(offset) + number)
            if not np.isfinite(loss).all():
                metrics[DIVERGED_STEP] = np.asarray(number)
                break
        accuracy = evaluate(data, key, state.model, held_out)
        return state, {"loss": loss.mean(), **metrics, **accuracy}

    return chunk


def _accuracies(
    context: Context, model: ModelState, held_out: Tree
) -> dict[str, Array]:
    return accuracies(
        lambda x: context.classifier.logits(model, x),
        held_out,
        context.settings.evaluation.batch_size,
    )
