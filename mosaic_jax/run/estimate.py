"""The cost of a study, estimated from a few steps of each of its loops."""

import dataclasses
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core.steps import Steps
from mosaic_jax.core.types import Tree
from mosaic_jax.run import environment
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.stopwatch import Stopwatch
from mosaic_jax.stages.base import Link, Outcome

_log = logging.getLogger(__name__)

# Seconds that a timed window should take, where the loop has enough steps.
SECONDS = 2.0
# At most this many steps in a window: longer ones would not be more exact.
WINDOW = 5


@dataclasses.dataclass(frozen=True)
class Cost:
    """The estimated cost of one stage.

    Attributes:
      stage: name of the stage.
      loops: of each loop by name: "steps", "seconds", "samples_per_second".
      seconds: of the whole stage, without compilation.
      flops: see `Stage.flops`.
      up: bytes that clients send to the server, by payload.
      down: bytes that the server sends to clients, by payload.
      peak_memory: bytes, of the device or this process, up to the end of the stage.
    """

    stage: str
    loops: dict[str, dict[str, float]]
    seconds: float
    flops: float
    up: dict[str, int]
    down: dict[str, int]
    peak_memory: int


def estimate(study: Experiment) -> list[Cost]:
    """Run a few steps of each loop of every stage, on the study's data.

    What surrounds the loops runs in full. Nothing is kept, and the run directory is not
    touched.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial = Experiment(_for_trial(study.settings), pathlib.Path(folder))
        artifacts: dict[str, Tree] = {}
        costs = []
        for link, _ in trial.plan():
            _log.info("%s: trying a few steps", link.name)
            cost, outcome = _try_stage(
                trial, link, artifacts, study.study.flops[link.name]
            )
            artifacts |= outcome.artifacts
            costs.append(cost)
    return costs


def _for_trial(study: Settings) -> Settings:
    """The settings with short windows."""
    return dataclasses.replace(
        study,
        profile="",
        # Generators of a few steps would count as collapsed.
        generators=dataclasses.replace(study.generators, collapse_below=0.0),
        log=dataclasses.replace(
            study.log, every_steps=min(study.log.every_steps, WINDOW)
        ),
    )


def _try_stage(
    trial: Experiment, link: Link, artifacts: dict[str, Tree], flops: float
) -> tuple[Cost, Outcome]:
    """Cost and outcome of a stage on the artifacts so far."""
    loops: dict[str, dict[str, float]] = {}
    start, state, spent = time.perf_counter(), None, 0.0
    with Stopwatch() as watch, trial.placement.axis.sharing():
        run = trial.start(link, artifacts)
        while True:
            try:
                steps = run.send(state)
            except StopIteration as end:
                outcome = end.value
                break
            before = time.perf_counter()
            loops[steps.name], state = _time_loop(steps)
            spent += time.perf_counter() - before
            # `spent` is without compilation, which `watch` counts.
            spent -= loops[steps.name].pop("compile_seconds")
    around = time.perf_counter() - start - spent - watch.compiling
    total = sum(loop["seconds"] for loop in loops.values()) + max(around, 0.0)
    cost = Cost(
        stage=link.name,
        loops=loops,
        seconds=total,
        flops=flops,
        up=outcome.up,
        down=outcome.down,
        peak_memory=environment.peak_memory(),
    )
    return cost, outcome


def _time_loop(steps: Steps) -> tuple[dict[str, float], Tree]:
    """The cost of a whole loop, from its first steps, and the state after those."""
    window = steps.window
    if not steps.work.on_host:
        window = jax.jit(window, donate_argnums=1)
    state = jax.tree.map(jnp.copy, steps.state)

    def time_steps(count: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(window(steps.args, state, 0, count))
        return time.perf_counter() - begin

    with Stopwatch() as watch:
        first = time_steps(1)
    alone = time_steps(1)
    more = min(max(round(SECONDS / alone), 1), steps.every, steps.num_steps)
    per_step, around = alone, 0.0
    if more > 1:
        # A window has a constant part as well, such as an evaluation.
        together = time_steps(more)
        per_step = max((together - alone) / (more - 1), 0.0)
        around = max(alone - per_step, 0.0)
    windows = math.ceil(steps.num_steps / steps.every)
    tracing = max(first - watch.compiling - alone, 0.0)
    seconds = steps.num_steps * per_step + windows * around + tracing
    result = {
        "steps": steps.num_steps,
        "seconds": seconds,
        "samples_per_second": steps.num_steps * steps.samples_per_step / seconds,
        "compile_seconds": watch.compiling,
    }
    return result, state


def table(costs: list[Cost], num_parameters: int) -> str:
    """The costs as text: a row for each stage, and one for the whole study."""
    head = f"{'stage':<22}{'steps':>9}{'TFLOP':>11}{'MB up':>10}{'MB down':>10}"
    lines = [head + f"{'samples/s':>11}{'seconds':>10}"]
    for cost in costs:
        steps = sum(loop["steps"] for loop in cost.loops.values())
        speed = max(
            (loop["samples_per_second"] for loop in cost.loops.values()), default=0
        )
        lines.append(
            f"{cost.stage:<22}{steps or '':>9}{cost.flops / 1e12:>11.4g}"
            f"{sum(cost.up.values()) / 1e6:>10.1f}"
            f"{sum(cost.down.values()) / 1e6:>10.1f}"
            f"{format(speed, '.0f') if speed else '':>11}{cost.seconds:>10.1f}"
        )

    def total(of: Callable[[Cost], Any]) -> float:
        return sum(of(cost) for cost in costs)

    lines.append(
        f"{'study':<22}{'':>9}{total(lambda c: c.flops) / 1e12:>11.4g}"
        f"{total(lambda c: sum(c.up.values())) / 1e6:>10.1f}"
        f"{total(lambda c: sum(c.down.values())) / 1e6:>10.1f}"
        f"{'':>11}{total(lambda c: c.seconds):>10.1f}"
    )
    peak = max(cost.peak_memory for cost in costs)
    lines.append(f"parameters of the classifier: {num_parameters}")
    lines.append(f"peak memory: {peak / 1e9:.2f} GB; compilation comes on top of time")
    return "\n".join(lines)
