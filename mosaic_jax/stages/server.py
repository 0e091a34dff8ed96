"""Stage of one-shot methods: the server trains on the clients of the last round."""

from mosaic_jax import prng
from mosaic_jax.loop import Run, Steps, repeat
from mosaic_jax.settings import Settings
from mosaic_jax.stages.base import Context, Outcome, Stage, assess
from mosaic_jax.types import Array, ModelState, Teachers, Tree


def stage(settings: Settings) -> Stage:
    """`server.rounds` rounds of `server.method`."""
    return Stage(
        name="server",
        needs=("client_models", "global_model"),
        provides=("student",),
        reads=("server",),
        run=_run,
    )


def _run(context: Context, client_models: ModelState, global_model: ModelState) -> Run:
    method, task = context.server, context.task

    def chunk(args: Tree, state: Tree, first: Array, end: Array):
        teachers, key = args

        def body(number: Array, state: Tree) -> Tree:
            training, model, metrics = method.train(
                task, *state, teachers, prng.at(key, number), number
            )
            return (training, model), metrics

        return repeat(body, state, first, end, mean=False)

    start = method.init(task, global_model, prng.named(context.key, "server"))
    client = context.clients.client
    teachers = Teachers(client_models, client.label_count, client.number)
    _, model = yield Steps(
        context.settings.server.method,
        chunk,
        (teachers, context.key),
        (start, global_model),
        context.settings.server.rounds,
        every=context.settings.log.every_steps,
        samples_per_step=method.batch_size,
    )
    results = assess(context, context.classifier.logits, model)
    return Outcome(artifacts={"student": model}, results=results)
