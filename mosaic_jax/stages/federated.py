"""Stages init, warmup and finetune: rounds of a federated algorithm."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from clu import parameter_overview

from mosaic_jax import (
    aggregation,
    algorithms,
    evaluation,
    parallel,
    prng,
    training,
    trees,
)
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.settings import Local, Settings
from mosaic_jax.stages.base import Context, Outcome, Stage, accuracies, assess
from mosaic_jax.types import (
    Array,
    Client,
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
        outcome = _run_rounds(
            context,
            model,
            settings.init.rounds,
            settings.local,
            keep_models=_keeps_models(settings),
        )
        outcome.results["num_parameters"] = int(
            parameter_overview.count_parameters(model.params)
        )
        # Label histograms travel once; experts and label shares need them.
        outcome.up["label_counts"] = context.data.label_count.size * 4
        return outcome

    return Stage(
        name="init",
        needs=(),
        provides=_provides(settings),
        depends=_depends(settings, settings.init.rounds, settings.local),
        run=run,
    )


def warmup_stage(settings: Settings) -> Stage:
    """Stage 3: further rounds after the generators have been sent."""

    def run(context: Context, global_model: ModelState) -> Outcome:
        return _run_rounds(
            context,
            global_model,
            settings.warmup.rounds,
            settings.local,
            keep_models=_keeps_models(settings),
        )

    return Stage(
        name="warmup",
        needs=("global_model",),
        provides=_provides(settings),
        depends=_depends(settings, settings.warmup.rounds, settings.local),
        run=run,
    )


def finetune_stage(settings: Settings) -> Stage:
    """Stage 8: rounds from the distilled model at its own learning rate."""
    local = dataclasses.replace(
        settings.local, learning_rate=settings.finetune.learning_rate
    )

    def run(context: Context, student: ModelState) -> Outcome:
        rounds = settings.finetune.rounds
        outcome = _run_rounds(context, student, rounds, local, keep_models=False)
        artifacts = {"final_model": outcome.artifacts["global_model"]}
        return dataclasses.replace(outcome, artifacts=artifacts)

    return Stage(
        name="finetune",
        needs=("student",),
        provides=("final_model",),
        depends=_depends(settings, settings.finetune.rounds, local),
        run=run,
    )


def _keeps_models(settings: Settings) -> bool:
    """Mosaic needs the models of all clients; others never hold them all at once."""
    return settings.method == "mosaic"


def _provides(settings: Settings) -> tuple[str, ...]:
    kept = ("client_models",) if _keeps_models(settings) else ()
    return ("global_model", *kept)


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
    axis: parallel.ClientAxis,
    data: FederatedDataset,
    *,
    key: Array,
    augmentation: str,
    keep_models: bool,
) -> Callable[[ServerState, Array], tuple[ServerState, Array]]:
    """A federated round as a pure function of the state and the round number.

    Returns:
      `round(state, number) -> state, mean loss of each client [C]`.
    """
    tx = training.sgd(local.learning_rate, local.weight_decay)
    total_size = jnp.sum(data.client.size)

    def federated_round(state: ServerState, number: Array):
        def client_update(
            client: Client,
            client_state: Tree,
            model: ModelState,
            images: LabelledImages,
        ):
            def batch_at(step: Array):
                return training.client_batch(
                    client,
                    images,
                    number * local.steps + step,
                    key=key,
                    batch_size=local.batch_size,
                    augmentation=augmentation,
                )

            trained, loss = training.local_training(
                classifier,
                tx,
                algorithm.receive(model, client_state),
                batch_at,
                local.steps,
                adjust_logits=lambda logits: algorithm.logits(
                    logits, client.label_count
                ),
                penalty=lambda params: algorithm.penalty(
                    params, model.params, client_state
                ),
            )
            upload, client_state = algorithm.upload(model, trained, client_state)
            kept = trained if keep_models else ()
            weighted = aggregation.weighted(upload, client.size / total_size)
            return (client_state, kept, loss), weighted

        (client, client_model, loss), mean_upload = axis.map_and_sum(
            client_update,
            data.client,
            state.client,
            shared=(state.model,),
            placed=(data.images,),
        )
        server, model = algorithm.aggregate(state.server, state.model, mean_upload)
        return ServerState(model, server, client, client_model), loss

    return federated_round


def initial_state(
    algorithm: Algorithm, model: ModelState, num_clients: int, *, keep_models: bool
) -> ServerState:
    """State before the first round."""
    return ServerState(
        model=model,
        server=algorithm.init_server(model),
        client=trees.broadcast(algorithm.init_client(model), num_clients),
        client_model=trees.broadcast(model, num_clients) if keep_models else (),
    )


def _run_rounds(
    context: Context, model: ModelState, rounds: int, local: Local, *, keep_models: bool
) -> Outcome:
    data, axis, classifier = context.clients, context.axis, context.classifier
    algorithm = algorithms.build(context.settings.init.method)
    augmentation = context.data.info.augmentation

    # Images and key are arguments: closed over, they would be constants of the
    # program, which would be huge, and compiled anew for each seed.
    @functools.partial(jax.jit, donate_argnames="state")
    def chunk(data, held_out, key, state: ServerState, first: Array, end: Array):
        federated_round = make_round(
            classifier,
            algorithm,
            local,
            axis,
            data,
            key=key,
            augmentation=augmentation,
            keep_models=keep_models,
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
        functools.partial(chunk, data, context.held_out, context.key),
        initial_state(algorithm, model, data.num_clients, keep_models=keep_models),
        rounds,
        every=context.settings.evaluation.every,
        samples_per_step=data.num_clients * local.steps * local.batch_size,
    )
    payload = rounds * data.num_clients * trees.num_bytes(model)
    artifacts = {"global_model": state.model}
    results = assess(context, classifier.logits, state.model)
    if keep_models:
        artifacts["client_models"] = state.client_model
        results["client_test_accuracy"] = _client_accuracy(context, state.client_model)
    return Outcome(
        artifacts=artifacts,
        results=results,
        up={"models": payload},
        down={"models": payload},
    )


def _client_accuracy(context: Context, client_model: ModelState) -> list[float]:
    """Accuracy of each client's own model on its share of the test images."""

    @jax.jit
    def run(client_model: ModelState, rows: Array, test: LabelledImages) -> Array:
        def one(model: ModelState, rows: Array, test: LabelledImages) -> Array:
            logits = evaluation.predict(
                lambda x: context.classifier.logits(model, x),
                test.image[rows],
                batch_size=context.settings.evaluation.batch_size,
            )
            return evaluation.accuracy(logits, test.label[rows])

        return context.axis.map(one, client_model, rows, shared=(test,))

    found = run(client_model, context.data.test_index, context.held_out["test"])
    return found.tolist()
