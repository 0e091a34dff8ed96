"""Stages init, warmup and finetune: rounds of a federated algorithm."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from mosaic_jax import (
    checkpoint,
    evaluation,
    prng,
    training,
    trees,
)
from mosaic_jax.loop import DIVERGED_STEP, Chunk, Run, Steps, repeat
from mosaic_jax.models import submodel
from mosaic_jax.settings import Local, Settings
from mosaic_jax.stages import rounds as common
from mosaic_jax.stages.base import Context, Outcome, Stage, accuracies, assess
from mosaic_jax.stages.rounds import HostRounds, Rounds
from mosaic_jax.types import (
    Array,
    Client,
    ClientModels,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Tree,
)


def init_stage(settings: Settings) -> Stage:
    """Stage 1: rounds from a random global model."""
    return Stage(
        name="init",
        needs=(),
        provides=_provides(settings),
        reads=_reads(settings),
        run=functools.partial(_run_init, **_kind(settings)),
    )


def warmup_stage(settings: Settings) -> Stage:
    """Stage 3: further rounds after the generators have been sent."""
    return Stage(
        name="warmup",
        needs=_provides(settings),
        provides=_provides(settings),
        reads=(*_reads(settings), "warmup"),
        run=functools.partial(_run_warmup, **_kind(settings)),
    )


def finetune_stage(settings: Settings) -> Stage:
    """Stage 8: rounds from the distilled model at its own learning rate."""
    return Stage(
        name="finetune",
        needs=("student", "round_state"),
        provides=("final_model",),
        reads=(*_reads(settings), "warmup", "finetune"),
        run=functools.partial(_run_finetune, trains_server=settings.trains_every_round),
    )


def _keeps_models(settings: Settings) -> bool:
    """Mosaic and one-shot methods need the models of all clients after the rounds."""
    return settings.method == "mosaic" or settings.trains_once


def _provides(settings: Settings) -> tuple[str, ...]:
    kept = ("client_models",) if _keeps_models(settings) else ()
    return ("global_model", "round_state", *kept)


def _kind(settings: Settings) -> dict[str, bool]:
    return {
        "keep_models": _keeps_models(settings),
        "trains_server": settings.trains_every_round,
    }


def _reads(settings: Settings) -> tuple[str, ...]:
    server = (
        ("server.method", "server.batch_norm") if settings.trains_every_round else ()
    )
    return (*common.reads(settings), *server)


def _run_init(context: Context, *, keep_models: bool, trains_server: bool) -> Run:
    key = prng.named(context.key, "model")
    init = jax.jit(context.classifier.init, static_argnums=1)
    model = init(key, context.data.info.image_shape)
    outcome = yield from _run_rounds(
        context,
        model,
        context.settings.init.rounds,
        context.settings.local,
        first=0,
        keep_models=keep_models,
        trains_server=trains_server,
    )
    outcome.results["num_parameters"] = int(
        parameter_overview.count_parameters(model.params)
    )
    # Label histograms travel once; experts and label shares need them.
    outcome.up["label_counts"] = context.data.label_count.size * 4
    return outcome


def _run_warmup(
    context: Context,
    global_model: ModelState,
    round_state: Tree,
    client_models: ClientModels | None = None,
    *,
    keep_models: bool,
    trains_server: bool,
) -> Run:
    settings = context.settings
    return _run_rounds(
        context,
        global_model,
        settings.warmup.rounds,
        settings.local,
        first=settings.init.rounds,
        carried=round_state,
        client_models=client_models,
        keep_models=keep_models,
        trains_server=trains_server,
    )


def _run_finetune(
    context: Context, student: ModelState, round_state: Tree, *, trains_server: bool
) -> Run:
    settings = context.settings
    outcome = yield from _run_rounds(
        context,
        student,
        settings.finetune.rounds,
        dataclasses.replace(
            settings.local, learning_rate=settings.finetune.learning_rate
        ),
        first=settings.init.rounds + settings.warmup.rounds,
        carried=round_state,
        keep_models=False,
        trains_server=trains_server,
    )
    artifacts = {"final_model": outcome.artifacts["global_model"]}
    return dataclasses.replace(outcome, artifacts=artifacts)


def _run_rounds(
    context: Context,
    model: ModelState,
    rounds: int,
    local: Local,
    *,
    first: int,
    keep_models: bool,
    trains_server: bool,
    carried: Tree = None,
    client_models: ClientModels | None = None,
) -> Run:
    """Rounds number `first` and on, with the states `carried` from those before.

    So with `client_models`, where they are kept. Where one stage ends and another
    begins changes no batch, no draw and no state.
    """
    settings = context.settings
    program = common.build(
        context,
        local,
        keep_models=keep_models,
        server=context.server if trains_server else None,
    )
    key = common.stream(settings)
    state = program.initial_state(model, key)
    if carried is not None:
        carried = checkpoint.restore_into(_carried(state), trees.flatten(carried))
        state = state.replace(**carried)
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
    settled = jax.jit(program.settled)(context.clients, key, state.model)
    state = state.replace(model=settled)
    artifacts = {"global_model": state.model, "round_state": _carried(state)}
    if keep_models:
        artifacts["client_models"] = _client_models(context, state)
    results = assess(context, context.classifier.logits, state.model)
    if first == 0:
        results |= _terms(context, model, key)
    results |= _of_rates(context, program, state.model, key, first + rounds - 1)
    results |= _of_clients(context, state, artifacts.get("client_models"))
    up, down = _sent(context, program, rounds)
    return Outcome(artifacts=artifacts, results=results, up=up, down=down)


def _of_rates(
    context: Context, program: Rounds, model: ModelState, key: Array, number: int
) -> dict[str, Any]:
    """Findings about clients' parts of the global `model` after round `number`."""
    if not context.rates:
        return {}
    return {
        "budgets": program.parts.budgets(context.data.info.image_shape),
        "rate_accuracy": _rate_accuracy(context, program, model, key, number),
    }


def _of_clients(
    context: Context, state: ServerState, models: ClientModels | None
) -> dict[str, Any]:
    """Findings about clients' own models, where they are kept or personal."""
    if models is not None:
        number = context.data.clients.client.number
        never = np.asarray(models.last_round) < 0
        return {
            "never_trained": number[never].tolist(),
            "client_test_accuracy": _client_accuracy(
                context, lambda _, own: own, state.model, models.model
            ),
        }
    if context.algorithm.personal:
        found = _client_accuracy(
            context, context.algorithm.receive, state.model, state.client
        )
        return {
            "personal": {"test_accuracy": float(np.mean(found))},
            "client_test_accuracy": found,
        }
    return {}


def _sent(
    context: Context, program: Rounds, rounds: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes up and down in `rounds` rounds and in the question after the last of them.

    Its answers are those that the global model is handed on with. Questions that only
    serve to measure a model are the simulation's, not the method's.
    """
    shape = context.data.info.image_shape
    sent = rounds * program.round_bytes(shape)
    up, down = {"models": sent.up}, {"models": sent.down}
    if context.algorithm.queries:
        asked = program.query_bytes(shape)
        up["moments"], down["queried_models"] = asked.up, asked.down
    if program.server is not None:
        # The labels that each client used in the round, by class.
        count = context.data.info.num_classes * np.dtype(np.float32).itemsize
        up["used_label_counts"] = rounds * program.clients_in_round * count
    return up, down


def _rate_accuracy(
    context: Context, program: Rounds, model: ModelState, key: Array, number: int
) -> dict[str, float]:
    """Test accuracy of the parts of the global model that clients of each rate hold.

    Of the first client of each rate, with what it held in round `number`.
    """
    parts = program.parts

    def logits(models: dict[str, ModelState], image: Array) -> dict[str, Array]:
        return {
            str(group.rate): parts.classifier_of(group.rate).logits(
                models[str(group.rate)], image
            )
            for group in parts.groups
        }

    @jax.jit
    def cut(data: FederatedDataset, key: Array, model: ModelState) -> dict:
        result = {}
        for group in parts.groups:
            channels = parts.channels(key, number, group.members[0], group.rate)
            part = parts.cut(model, channels)
            if context.algorithm.queries:
                part = program.queried(data, key, part, data.client.size, group.rate)
            result[str(group.rate)] = part
        return result

    found = assess(context, logits, cut(context.clients, key, model))
    return {rate: row["test_accuracy"] for rate, row in found.items()}


def _terms(context: Context, model: ModelState, key: Array) -> dict[str, str]:
    """Digests of what methods that are compared must share."""
    local = context.settings.local

    @jax.jit
    def order(client: Client, key: Array) -> Array:
        def one(client: Client) -> Array:
            return training.client_rows(
                client, 0, local.steps, key=key, batch_size=local.batch_size
            )[0]

        return jax.vmap(one)(client)

    client = context.data.clients.client
    return {
        "initial_params_sha256": trees.digest(jax.device_get(model)),
        "batch_order_sha256": trees.digest(jax.device_get(order(client, key))),
    }


def _carried(state: ServerState) -> Tree:
    """What later rounds must know besides the global model."""
    return {
        "server": state.server,
        "client": state.client,
        "last_round": state.last_round,
        "training": state.training,
    }


def _client_models(context: Context, state: ServerState) -> ClientModels:
    """What clients have after the rounds.

    Who never trained has the global model, or the part of it that it can hold.
    """
    never = np.flatnonzero(np.asarray(state.last_round) < 0)

    def filled(own: Array | np.ndarray, whole: Array) -> Array | np.ndarray:
        if not isinstance(own, np.ndarray):
            return own.at[never].set(whole)
        own[never] = whole
        return own

    model = state.client_model
    if len(never):
        whole = trees.broadcast(state.model, len(never))
        if context.rates:
            share = common.held_in(context, state.model, state.last_round)
            whole = submodel.within(whole, trees.take(share, never))
        model = jax.tree.map(filled, model, whole)
    return ClientModels(model=model, last_round=state.last_round)


def _chunk(context: Context, program: Rounds) -> Chunk:
    """Rounds and an evaluation, one program; metrics are those of the last round.

    The number of the stage's first round is an argument: stages share the program.
    """

    def chunk(args: Tree, state: ServerState, first: Array, end: Array):
        data, held_out, key, offset = args

        def body(number: Array, state: ServerState) -> Tree:
            state, loss, metrics = program.run(data, key, state, offset + number)
            return state, {"loss": jnp.mean(loss), **metrics}

        state, metrics = repeat(body, state, first, end, mean=False)
        model = program.settled(data, key, state.model)
        return state, metrics | _accuracies(context, model, held_out)

    return chunk


def _chunk_on_host(context: Context, program: Rounds) -> Chunk:
    """The same where clients' states do not fit on the devices."""
    on_host = HostRounds(program)

    @jax.jit
    def evaluate(data: Tree, key: Array, model: ModelState, held_out: Tree) -> dict:
        model = program.settled(data, key, model)
        return _accuracies(context, model, held_out)

    def chunk(args: Tree, state: ServerState, first: int, end: int):
        data, held_out, key, offset = args
        for number in range(first, end):
            state, loss, metrics = on_host.run(data, key, state, int(offset) + number)
            if not np.isfinite(loss).all():
                metrics[DIVERGED_STEP] = number
                break
        found = evaluate(data, key, state.model, held_out)
        return state, {"loss": loss.mean(), **metrics, **found}

    return chunk


def _accuracies(context: Context, model: ModelState, held_out: Tree) -> dict:
    return accuracies(
        lambda x: context.classifier.logits(model, x),
        held_out,
        context.settings.evaluation.batch_size,
    )


def _client_accuracy(
    context: Context,
    model_of: Callable[[ModelState, Tree], ModelState],
    model: ModelState,
    client_state: Tree,
) -> list[float]:
    """Accuracy of each client's `model_of(model, own state)` on its test images."""
    axis, held_out = context.axis, context.held_out["test"]
    size = axis.num_devices * axis.at_once

    @jax.jit
    def run(model: ModelState, own: Tree, rows: Array, test: LabelledImages) -> Array:
        def one(own: Tree, rows: Array, model: ModelState, test: LabelledImages):
            mine = model_of(model, own)
            logits = evaluation.predict(
                lambda x: context.classifier.logits(mine, x),
                test.image[rows],
                batch_size=context.settings.evaluation.batch_size,
            )
            return evaluation.accuracy(logits, test.label[rows])

        return axis.of(len(rows)).map(one, own, rows, shared=(model, test))

    # As many as train at once: the states may be too large for the devices.
    found = []
    for first in range(0, axis.num_clients, size):
        part = slice(first, first + size)
        own = axis.replicate(trees.take(client_state, part))
        found += run(model, own, context.data.test_index[part], held_out).tolist()
    return found
