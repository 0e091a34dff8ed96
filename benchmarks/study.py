"""How long a whole study takes on this device, stage by stage, without its data.

    python -m benchmarks.study
    python -m benchmarks.study --config digits_mosaic --peak_tflops 0.8

Every stage of the config runs its own programs at full size on random images, two
chunks of a few steps each; the second, which compiles nothing, is timed and multiplied
by the steps of the study. Prints, and writes to benchmarks/results/study_CONFIG.json,
for each loop of each stage: its steps in the study (of clients that each run their own:
the sum over clients), samples per second, model FLOPs (twice the multiply-adds of the
networks, gradients at twice the forward pass, no recomputation; those of a stage of
several loops are shared out by their time), their share of the peak given by
--peak_tflops, and hours. Evaluations are a row of their own.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from mosaic_jax.cli import config_files, launch
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Tree
from mosaic_jax.data import federated, sources
from mosaic_jax.data.dataset import Arrays, Info
from mosaic_jax.data.settings import Data
from mosaic_jax.fl import evaluation, parallel
from mosaic_jax.run import settings
from mosaic_jax.run import study as studies
from mosaic_jax.run.placement import Placement
from mosaic_jax.run.study import Study
from mosaic_jax.stages import generators
from mosaic_jax.stages.federation import FederatedStage

NUM_TEST = 256
# Training images of data sets that do not have 50,000.
NUM_TRAIN = {"digits": 1437}


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
        chunk = jax.jit(steps.window, donate_argnums=1)
        state = jax.tree.map(jnp.copy, steps.state)
        state, _ = jax.block_until_ready(chunk(steps.args, state, 0, few))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(chunk(steps.args, state, few, 2 * few))
        rows[steps.name] = {
            "steps": steps.num_steps,
            "seconds_per_step": (time.perf_counter() - start) / few,
            "samples_per_step": steps.samples_per_step,
        }


def arrays(config: Data, info: Info) -> Arrays:
    """Random images, every class as often."""
    num_train = config.max_images or NUM_TRAIN.get(config.name, 50_000)
    np_rng = np.random.RandomState(0)

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        image = np_rng.randint(0, 256, (count, *info.image_shape)).astype(np.uint8)
        return image, (np.arange(count) % info.num_classes).astype(np.int32)

    return Arrays(*images(num_train), *images(NUM_TEST))


def of_config(
    name: str, overrides: dict[str, Any], images: Callable[[Data, Info], Arrays]
) -> Study:
    """The study of a config on images that are made up.

    Args:
      name: of the config, and its variant after a colon.
      overrides: values of fields of the config by dotted name.
      images: such as `arrays`.
    """
    mapping = config_files.load(name)
    mapping.update_from_flattened_dict(overrides)
    config = settings.from_mapping(mapping.to_dict())
    info = sources.SOURCES[config.data.name].info
    data = federated.build(config.data, config.seed, info, images(config.data, info))
    return studies.build(config, data)


def training_flops(study: Study) -> dict[str, float]:
    """FLOPs of every stage by name, evaluations left out."""
    data = dataclasses.replace(study.data, held_out={})
    return dataclasses.replace(study, data=data).flops


def client_steps(
    study: Study, axis: parallel.ClientAxis, name: str, timed: dict[str, Any]
) -> None:
    """Loops of unequal clients count steps by client: turn windows into those.

    Args:
      study: of the loop.
      axis: where its clients run.
      name: of the loop.
      timed: what `probe` found of it, changed in place.
    """
    config, sizes = study.settings, study.data.clients.client.size
    batch = config.local.batch_size
    if name == "gan":
        batch = config.generators.batch_size
        steps = generators.num_steps(config.generators, sizes)
    elif name == "classifier":
        epochs = config.compat.classifier_epochs
        steps = generators.steps_of_epochs(epochs, sizes, batch)
    else:
        steps = np.full(len(sizes), config.experts.local_steps)
    plan = axis.plan(steps, config.log.every_steps)
    # The probe's window had every client at work on one lane, or every lane.
    at_work = len(sizes) if plan.lanes == 1 else plan.lanes * axis.num_devices
    timed["seconds_per_step"] /= at_work
    timed["samples_per_step"] = batch
    timed["steps"] = plan.processed


def measure(name: str, num_steps: int, overrides: dict[str, Any]) -> list[dict]:
    """One row per loop.

    Args:
      name: of the config, and its variant after a colon.
      num_steps: of a timed chunk.
      overrides: values of fields of the config by dotted name.
    """
    study = of_config(name, overrides, arrays)
    placement, flops = Placement(study), training_flops(study)
    artifacts: dict[str, Tree] = {}
    rows = []
    for link in study.chain:
        start = time.perf_counter()
        needed = {key: artifacts[key] for key in link.needs(study.settings)}
        few = 1 if isinstance(link.stage, FederatedStage) else num_steps
        outcome, loops = probe(link.run(placement.context(link), needed), few)
        print(f"{link.name}: probed in {time.perf_counter() - start:.0f} s", flush=True)
        artifacts |= outcome.artifacts
        for loop, timed in loops.items():
            if loop in ("gan", "classifier", "local"):
                client_steps(study, placement.axis, loop, timed)
        total = sum(one["steps"] * one["seconds_per_step"] for one in loops.values())
        rows += [
            {
                "stage": f"{link.name} {loop}",
                **timed,
                "flops_per_step": flops[link.name] * timed["seconds_per_step"] / total,
                "seconds": timed["steps"] * timed["seconds_per_step"],
            }
            for loop, timed in loops.items()
        ]
    return [*rows, _evaluations(study, artifacts["global_model"])]


def _evaluations(study: Study, model: Tree) -> dict[str, Any]:
    """The global model on 10,000 test images, as often as the study does."""
    config, classifier = study.settings, study.classifier
    image = jnp.asarray(study.data.held_out["test"].image)
    size = config.evaluation.batch_size

    @jax.jit
    def run(model: Tree, image: jax.Array) -> jax.Array:
        logits = evaluation.predict(
            lambda x: classifier.logits(model, x), image, batch_size=size
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
        "flops_per_step": 10_000 * classifier.flops(study.data.info.image_shape),
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
    launch.prepare()
    overrides = {
        "model.dtype": args.dtype,
        "compute.clients_at_once": args.clients_at_once,
        "compute.client_state": "device",
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
