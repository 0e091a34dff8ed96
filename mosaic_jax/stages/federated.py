"""Stages init, warmup and finetune: rounds of a federated algorithm."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from clu import parameter_overview

from mosaic_jax import algorithms, evaluation, parallel, prng, training, trees
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.settings import Local, Settings
from mosaic_jax.stages.base import Context, Outcome, Stage, accuracies, assess
from mosaic_jax.types import (
    Array,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Tree,
)


def init_stage(settings: Settings) -> Stage:
    """Stage 1: rounds from a random global model."""

    def run(context: Context) -> Outcome:
        key = prng.named(context.key, "model")
        init = jax.jit(context.classifier.init, static_argnums=1)
        model = init(key, context.data.info.image_shape)
        outcome = _run_rounds(context, model, settings.init.rounds, settings.local)
        outcome.results["num_parameters"] = int(
            parameter_overview.count_parameters(model.params)
        )
        # Label histograms travel once; experts and label shares need them.
        outcome.up["label_counts"] = context.data.label_count.size * 4
        return outcome

    return Stage(
        name="init",
        needs=(),
        provides=("global_model", "client_models"),
        depends=_depends(settings, settings.init.rounds, settings.local),
        run=run,
    )


def warmup_stage(settings: Settings) -> Stage:
    """Stage 3: further rounds after the generators have been sent."""

    def run(context: Context, global_model: ModelState) -> Outcome:
        rounds = settings.warmup.rounds
        return _run_rounds(context, global_model, rounds, settings.local)

    return Stage(
        name="warmup",
        needs=("global_model",),
        provides=("global_model", "client_models"),
        depends=_depends(settings, settings.warmup.rounds, settings.local),
        run=run,
    )


def finetune_stage(settings: Settings) -> Stage:
    """Stage 8: rounds from the distilled model at its own learning rate."""
    local = dataclasses.replace(
        settings.local, learning_rate=settings.finetune.learning_rate
    )

    def run(context: Context, student: ModelState) -> Outcome:
        outcome = _run_rounds(context, student, settings.finetune.rounds, local)
        artifacts = {"final_model": outcome.artifacts["global_model"]}
        return dataclasses.replace(outcome, artifacts=artifacts)

    return Stage(
        name="finetune",
        needs=("student",),
        provides=("final_model",),
        depends=_depends(settings, settings.finetune.rounds, local),
        run=run,
    )


def _depends(settings: Settings, rounds: int, local: Local) -> dict:
    return {
        "rounds": rounds,
        "local": dataclasses.asdict(local),
        "method": settings.init.method,
    }


def make_round(
    classifier: Classifier,
    algorithm: Algorithm,
    local: Local,
    data: FederatedDataset,
    *,
    key: Array,
    augmentation: str,
) -> Callable[[ServerState, Array], tuple[ServerState, Array]]:
    """A federated round as a pure function of the state and the round number.

    Returns:
      `round(state, number) -> state, mean loss of each client [C]`.
    """
    tx = training.sgd(local.learning_rate, local.weight_decay)

    def client_update(
        model: ModelState, client: Array, client_state: Tree, number: Array
    ):
        start = algorithm.receive(model, client_state)
        label_count = data.label_count[client]

        def batch_at(step: Array):
            return training.client_batch(
                data,
                client,
                number * local.steps + step,
                key=key,
                batch_size=local.batch_size,
                augmentation=augmentation,
            )

        trained, loss = training.local_training(
            classifier,
            tx,
            start,
            batch_at,
            local.steps,
            adjust_logits=lambda logits: algorithm.logits(logits, label_count),
            penalty=lambda p: algorithm.penalty(p, model.params, client_state),
        )
        upload, client_state = algorithm.upload(model, trained, client_state)
        return upload, client_state, trained, loss

    def federated_round(state: ServerState, number: Array):
        uploads, client, client_model, loss = parallel.client_map(
            lambda i, s: client_update(state.model, i, s, number),
            jnp.arange(data.num_clients),
            state.client,
        )
        weight = data.size.astype(jnp.float32)
        server, model = algorithm.aggregate(state.server, state.model, uploads, weight)
        return ServerState(model, server, client, client_model), loss

    return federated_round


def initial_state(
    algorithm: Algorithm, model: ModelState, num_clients: int
) -> ServerState:
    """State before the first round."""
    return ServerState(
        model=model,
        server=algorithm.init_server(model),
        client=trees.broadcast(algorithm.init_client(model), num_clients),
        client_model=trees.broadcast(model, num_clients),
    )


def _run_rounds(
    context: Context, model: ModelState, rounds: int, local: Local
) -> Outcome:
    data = context.data.clients
    algorithm = algorithms.build(context.settings.init.method)
    classifier = context.classifier
    held_out = context.data.held_out
    augmentation = context.data.info.augmentation

    # Images and key are arguments: closed over, they would be constants of the
    # program, which would be huge, and compiled anew for each seed.
    @jax.jit
    def chunk(data, held_out, key, state: ServerState, first: Array, end: Array):
        federated_round = make_round(
            classifier,
            algorithm,
            local,
            data,
            key=key,
            augmentation=augmentation,
        )

        def body(number, carry):
            state, loss = federated_round(carry[0], number)
            return state, jnp.mean(loss)

        state, loss = jax.lax.fori_loop(first, end, body, (state, jnp.zeros(())))
        accuracy = accuracies(
            lambda x: classifier.logits(state.model, x),
            held_out,
            context.settings.evaluation.batch_size,
        )
        return state, {"loss": loss, **accuracy}

    state = context.loop(
        "round",
        functools.partial(chunk, data, held_out, context.key),
        initial_state(algorithm, model, data.num_clients),
        rounds,
        every=context.settings.evaluation.every,
        samples_per_step=data.num_clients * local.steps * local.batch_size,
    )
    payload = rounds * data.num_clients * trees.num_bytes(model)
    return Outcome(
        artifacts={"global_model": state.model, "client_models": state.client_model},
        results=_results(context, state),
        up={"models": payload},
        down={"models": payload},
    )


def _results(context: Context, state: ServerState) -> dict:
    classifier = context.classifier

    @jax.jit
    def client_accuracy(client_model: ModelState, test: LabelledImages) -> Array:
        def one(model: ModelState, rows: Array) -> Array:
            logits = evaluation.predict(
                lambda x: classifier.logits(model, x),
                test.image[rows],
                batch_size=context.settings.evaluation.batch_size,
            )
            return evaluation.accuracy(logits, test.label[rows])

        rows = jnp.asarray(context.data.test_index)
        return parallel.client_map(one, client_model, rows)

    per_client = client_accuracy(state.client_model, context.data.held_out["test"])
    return {
        **assess(context, classifier.logits, state.model),
        "client_test_accuracy": per_client.tolist(),
    }
