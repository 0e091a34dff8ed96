"""Stage of one-shot methods: the server trains on the clients' models after rounds."""

import numpy as np

from mosaic_jax import prng, trees
from mosaic_jax.loop import Run, Steps, repeat
from mosaic_jax.settings import Settings
from mosaic_jax.stages import rounds
from mosaic_jax.stages.base import Context, Outcome, Stage, assess
from mosaic_jax.types import Array, ClientModels, ModelState, Teachers, Tree


def stage(settings: Settings) -> Stage:
    """`server.rounds` rounds of `server.method`."""
    return Stage(
        name="server",
        needs=("client_models", "global_model"),
        provides=("student",),
        reads=("server",),
        run=_run,
    )


def _run(
    context: Context, client_models: ClientModels, global_model: ModelState
) -> Run:
    method, task, config = context.server, context.task, context.settings.server
    # Nobody learns from a client that never trained.
    members = np.flatnonzero(
        rounds.taking_part(client_models.last_round, config.participants)
    )
    client = context.clients.client
    teachers = Teachers(client_models.model, client.label_count, client.number)
    teachers = trees.take(teachers, members)

    def chunk(args: Tree, state: Tree, first: Array, end: Array):
        teachers, key = args

        def body(number: Array, state: Tree) -> Tree:
            training, model, metrics = method.train(
                task, *state, teachers, prng.at(key, number), number
            )
            return (training, model), metrics

        return repeat(body, state, first, end, mean=False)

    start = method.init(task, global_model, prng.named(context.key, "server"))
    _, model = yield Steps(
        config.method,
        chunk,
        (teachers, context.key),
        (start, global_model),
        config.rounds,
        every=context.settings.log.every_steps,
        samples_per_step=method.batch_size,
    )
    results = assess(context, context.classifier.logits, model)
    results["num_teachers"] = len(members)
    return Outcome(artifacts={"student": model}, results=results)
