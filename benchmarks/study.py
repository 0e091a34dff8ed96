"""How long a whole study takes on this device, stage by stage, without its data.

    python -m benchmarks.study
    python -m benchmarks.study --config digits_mosaic --peak_tflops 0.8

Every stage of the config runs its own programs at full size on random images, two
chunks of a few steps each; the second, which compiles nothing, is timed and multiplied
by the steps of the study. Prints, and writes to benchmarks/results/study_CONFIG.json,
for each loop of each stage: its steps in the study (of clients that each run their own:
the sum over clients), samples per second, model FLOPs (twice the multiply-adds of the
networks, gradients at twice the forward pass, no recomputation), their share of the
peak given by --peak_tflops, and hours. Evaluations are a row of their own.
"""

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from mosaic_jax import (
    algorithms,
    cli,
    distillation,
    evaluation,
    experiment,
    gan,
    parallel,
    prng,
    settings,
)
from mosaic_jax import stages as chain
from mosaic_jax.data import federated, sources
from mosaic_jax.data.arrays import Arrays, Info
from mosaic_jax.loop import Run
from mosaic_jax.stages import generators
from mosaic_jax.stages.base import Context
from mosaic_jax.types import Tree

NUM_TEST = 256


def probe(run: Run, num_steps: int) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A stage with loops of two chunks; the second is timed. Outcome, rows by name."""
    rows = {}
    state = None
    while True:
        try:
            steps = run.send(state)
        except StopIteration as end:
            return end.value, rows
        few = max(1, min(num_steps, steps.num_steps // 2))
        chunk = jax.jit(steps.chunk, donate_argnums=1)
        state = jax.tree.map(jnp.copy, steps.state)
        state, _ = jax.block_until_ready(chunk(steps.args, state, 0, few))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(chunk(steps.args, state, few, 2 * few))
        rows[steps.name] = {
            "steps": steps.num_steps,
            "seconds_per_step": (time.perf_counter() - start) / few,
            "samples_per_step": steps.samples_per_step,
        }


def arrays(info: Info, num_train: int) -> Arrays:
    """Random images, every class as often."""
    np_rng = np.random.RandomState(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        image = np_rng.randint(0, 256, (count, *info.image_shape)).astype(np.uint8)
        return image, (np.arange(count) % info.num_classes).astype(np.int32)

    return Arrays(*images(num_train), *images(NUM_TEST))


def flops(function: Callable[..., Any], *shapes: Tree) -> float:
    """Of the program, as XLA counts before it optimises."""
    return float(jax.jit(function).lower(*shapes).cost_analysis()["flops"])


def forward_flops(study: Context) -> dict[str, float]:
    """Per image: classifier, generator, discriminator."""
    shape = (1, *study.data.info.image_shape)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    model_gan = gan.build(study.settings, study.data.info, study.classifier)
    state = jax.eval_shape(lambda: model_gan.init(prng.root(0), shape[1:]))
    z = jax.ShapeDtypeStruct((1, model_gan.latent_dim), jnp.float32)
    return {
        "classifier": study.classifier.flops(shape[1:]),
        "generator": flops(model_gan.sample, state.generator, z),
        "discriminator": flops(
            lambda d, x: model_gan.discriminator.apply(d.variables, x, train=False),
            state.discriminator,
            image,
        ),
    }


def flops_per_sample(config: settings.Settings, num_classes: int, of: dict) -> dict:
    """Of one image in each loop."""
    train = 3 * of["classifier"]
    shaping = config.generators.entropy_weight or config.generators.diversity_weight
    return {
        "round": train,
        "local": train,
        "classifier": train,
        # The discriminator judges real and fake with gradients, then fake once more
        # for the generator, whose gradient stops at its input.
        "gan": 3 * of["generator"]
        + 8 * of["discriminator"]
        + 2 * of["classifier"] * bool(shaping),
        "student": num_classes * of["classifier"] + of["generator"] + train,
        "head": 0.0,
    }


def client_steps(context: Context, name: str, timed: dict) -> None:
    """Loops of unequal clients count steps by client: turn windows into those."""
    config, sizes = context.settings, context.data.clients.client.size
    if name == "gan":
        steps = generators.num_steps(config.generators, sizes)
        batch = config.generators.batch_size
    elif name == "classifier":
        epochs = config.generators.classifier_epochs
        batch = config.local.batch_size
        steps = generators.steps_of_epochs(epochs, sizes, batch)
    else:
        batch = config.local.batch_size
        steps = np.full(len(sizes), config.experts.local_steps)
    every = config.log.every_steps
    plan = context.axis.plan(steps, every)
    lanes = plan.lanes * context.axis.num_devices
    # The probe's window had every client at work on one lane, or every lane.
    at_work = len(sizes) if plan.lanes == 1 else lanes
    timed["seconds_per_step"] /= at_work
    timed["samples_per_step"] = batch
    timed["steps"] = plan.processed


def context_of(
    config: settings.Settings,
    info: Info,
    data: federated.StudyData,
    axis: parallel.ClientAxis,
) -> Context:
    """What every stage of a study may read, without a run directory."""
    networks = experiment.build_classifiers(config, info)
    return Context(
        settings=config,
        data=data,
        clients=axis.place(data.clients),
        held_out=axis.replicate(data.held_out),
        axis=axis,
        networks=networks,
        name=config.model.name,
        algorithm=algorithms.build(config),
        server=distillation.build(config),
        task=experiment.build_task(config, info, networks[config.model.name]),
        state_on_host=False,
        key=prng.root(0),
    )


def measure(name: str, num_steps: int, overrides: dict[str, Any]) -> list[dict]:
    """One row per loop."""
    name, _, variant = name.partition(":")
    module = importlib.import_module(f"configs.{name}")
    mapping = module.get_config(variant) if variant else module.get_config()
    mapping.update_from_flattened_dict(overrides)
    config = settings.from_mapping(mapping.to_dict())
    info = sources.SOURCES[config.data.name].info
    num_train = config.data.max_images or {"digits": 1437}.get(config.data.name, 50_000)
    data = federated.build(config.data, config.seed, info, arrays(info, num_train))
    axis = parallel.build(
        data.clients.client.size, at_once=config.compute.clients_at_once
    )
    context = context_of(config, info, data, axis)
    per_sample = flops_per_sample(config, info.num_classes, forward_flops(context))
    artifacts: dict[str, Tree] = {}
    rows = []
    for stage in chain.pipeline(config):
        inputs = {name: artifacts[name] for name in stage.needs}
        start = time.perf_counter()
        few = 1 if stage.name in ("init", "warmup", "finetune") else num_steps
        outcome, loops = probe(stage.run(context, **inputs), few)
        print(
            f"{stage.name}: probed in {time.perf_counter() - start:.0f} s", flush=True
        )
        artifacts |= outcome.artifacts
        for loop, timed in loops.items():
            if loop in ("gan", "classifier", "local"):
                client_steps(context, loop, timed)
            rows.append(
                {
                    "stage": f"{stage.name} {loop}",
                    **timed,
                    "flops_per_step": per_sample[loop] * timed["samples_per_step"],
                    "seconds": timed["steps"] * timed["seconds_per_step"],
                }
            )
    return [*rows, _evaluations(context, artifacts["global_model"], per_sample)]


def _evaluations(context: Context, model: Tree, per_sample: dict) -> dict:
    """The global model on 10,000 test images, as often as the study does."""
    config = context.settings
    image = context.held_out["test"].image
    size = config.evaluation.batch_size

    @jax.jit
    def run(model: Tree, image: jax.Array) -> jax.Array:
        logits = evaluation.predict(
            lambda x: context.classifier.logits(model, x), image, batch_size=size
        )
        return jnp.argmax(logits, -1)

    jax.block_until_ready(run(model, image))
    start = time.perf_counter()
    jax.block_until_ready(run(model, image))
    each = (time.perf_counter() - start) / len(image)
    times = config.total_rounds // config.evaluation.every + 1
    return {
        "stage": "evaluations",
        "steps": times,
        "seconds_per_step": 10_000 * each,
        "samples_per_step": 10_000,
        "flops_per_step": 10_000 * per_sample["round"] / 3,
        "seconds": times * 10_000 * each,
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="cifar10_mosaic", help="name[:variant]")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients_at_once", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=1, help="of a timed chunk")
    parser.add_argument("--peak_tflops", type=float, default=0.0)
    args = parser.parse_args()
    cli.prepare()
    overrides = {
        "model.dtype": args.dtype,
        "compute.clients_at_once": args.clients_at_once,
        "data.validation": 0.0,
        "log.every_steps": args.num_steps,
        # Generators of two steps would all count as collapsed.
        "generators.collapse_below": 0.0,
    }
    rows = measure(args.config, args.num_steps, overrides)
    shown = []
    for row in rows:
        rate = row["flops_per_step"] / row["seconds_per_step"] / 1e12
        share = f"{rate / args.peak_tflops:.1%}" if args.peak_tflops else ""
        shown.append(
            (
                row["stage"],
                row["steps"],
                f"{row['seconds_per_step']:.4g}",
                f"{row['samples_per_step'] / row['seconds_per_step']:.0f}",
                f"{rate:.3f}",
                share,
                f"{row['seconds'] / 3600:.3f}",
            )
        )
    total = sum(row["seconds"] for row in rows)
    shown.append(("study", "", "", "", "", "", f"{total / 3600:.3f}"))
    header = "stage", "steps", "s per step", "samples/s", "TFLOP/s", "of peak", "hours"
    print(timing.table(header, shown))
    name = f"study_{args.config.replace(':', '_')}"
    timing.save(name, {"rows": rows, "total_seconds": total})


if __name__ == "__main__":
    main()
