"""The one loop around jitted steps: checkpoints, resume, metrics, interruption.

A stage is a generator: it yields the `Steps` it wants run and gets their final state.
So stages of several seeds can stand at the same point, and what they ask for can run as
one program.
"""

import dataclasses
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import checkpoint, environment, errors, tracking, trees
from mosaic_jax.errors import Interrupted
from mosaic_jax.stopwatch import Stopwatch, TimeSheet
from mosaic_jax.types import Array, Tree

_log = logging.getLogger(__name__)

# (args, state, first step, end) -> state, scalar metrics
Chunk = Callable[[Tree, Tree, Any, Any], tuple[Tree, dict[str, Any]]]
# Yields `Steps`, is sent their final states, returns the outcome of a stage.
Run = Generator["Steps", Tree, Any]


@dataclasses.dataclass(frozen=True)
class Steps:
    """A loop that a stage asks for: `state = yield Steps(...)`.

    Attributes:
      name: of the loop within its stage.
      chunk: runs steps first..end - 1. Pure; whatever differs between seeds comes in
        `args`: arrays closed over are constants of the program.
      args: arrays that stay.
      state: at step 0.
      num_steps: in all.
      every: steps in a chunk.
      samples_per_step: for the progress bar.
      together: may be batched over seeds.
      on_host: `chunk` is no program but calls some; NumPy leaves of `state` stay in
        host memory.
    """

    name: str
    chunk: Chunk
    args: Tree
    state: Tree
    num_steps: int
    every: int
    samples_per_step: int
    together: bool = True
    on_host: bool = False


class Interruption:
    """Notes SIGINT, SIGTERM and SIGHUP while entered; a second one ends the process.

    One that the process was started to ignore, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        """Not asked to stop yet."""
        self.signum = 0

    def __enter__(self) -> "Interruption":
        """Install the handlers."""
        self._previous = {
            signum: signal.signal(signum, self._handle)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(signum) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Put the previous handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        self.signum = signum
        _log.warning("stopping after the current step; signal again to stop at once")
        signal.signal(signum, signal.SIG_DFL)


# Metrics of a chunk that are no numbers to plot: where training stopped being finite.
DIVERGED_STEP, DIVERGED_CLIENT = "diverged_step", "diverged_client"


def repeat(
    body: Callable[[Array, Tree], tuple[Tree, dict[str, Array]]],
    state: Tree,
    first: Array,
    end: Array,
    *,
    mean: bool = True,
) -> tuple[Tree, dict[str, Array]]:
    """A chunk of equal steps: `body(step, state) -> state, scalar metrics`.

    Returns:
      The state, and the metrics' mean over the steps, or those of the last one; among
      them `DIVERGED_STEP`, the first step whose metrics were not finite, else -1, and
      the highest `DIVERGED_CLIENT` where `body` names such.
    """
    shapes = jax.eval_shape(body, first, state)[1]
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    nowhere = jnp.full((), -1, jnp.int32)
    client = zeros.pop(DIVERGED_CLIENT, None)
    if client is not None:
        client = nowhere

    def one(step: Array, carry: Tree) -> Tree:
        state, metrics, at, client = carry
        state, found = body(step, state)
        named = found.pop(DIVERGED_CLIENT, None)
        now = (at < 0) & ~trees.all_finite(found)
        if named is not None:
            client = jnp.where(now, named, client)
        at = jnp.where(now, step, at).astype(jnp.int32)
        if mean:
            found = trees.add(metrics, found)
        return state, found, at, client

    state, metrics, at, client = jax.lax.fori_loop(
        first, end, one, (state, zeros, nowhere, client)
    )
    if mean:
        metrics = jax.tree.map(lambda total: total / (end - first), metrics)
    at = jnp.where((at < 0) & ~trees.all_finite(state), end - 1, at)
    metrics[DIVERGED_STEP] = at.astype(jnp.int32)
    if client is not None:
        metrics[DIVERGED_CLIENT] = client
    return state, metrics


@dataclasses.dataclass(frozen=True)
class Loop:
    """Where the loops of one stage of one study keep their state and their records.

    Attributes:
      stage: its name, for records.
      seed: of the study, for messages.
      directory: where checkpoints go while it runs.
      tracker: of the run.
      progress: of the run.
      interruption: asked between chunks.
      checkpoint_seconds: least time between two checkpoints.
      place: puts arrays on the devices.
      identity: of the stage, for its checkpoints.
      time_sheet: of the stage.
      profile: folder for a trace of one chunk, None for none.
    """

    stage: str
    seed: int
    directory: pathlib.Path
    tracker: tracking.Tracker
    progress: tracking.Progress
    interruption: Interruption
    checkpoint_seconds: float
    place: Callable[[Tree], Tree]
    identity: Mapping[str, Any]
    time_sheet: TimeSheet
    profile: pathlib.Path | None = None


class _Running:
    """A loop of one seed under way: `state` after `step` steps."""

    def __init__(self, loop: Loop, steps: Steps) -> None:
        """Begin at the last checkpoint, or at step 0."""
        self.loop, self.steps = loop, steps
        self._saved = checkpoint.Checkpoints(
            loop.directory / steps.name, {**loop.identity, "loop": steps.name}
        )
        latest = self._saved.latest()
        self.step, state, history = 0, steps.state, []
        if latest is not None:
            self.step, history = latest[0], latest[2]["history"]
            state = checkpoint.restore_into(state, latest[1])
            _log.info("%s %s: resuming at step %d", loop.stage, steps.name, self.step)
        # Records past the checkpoint are of steps that run again.
        loop.tracker.replace(loop.stage, history, loop=steps.name)
        # Chunks donate their state; the caller's arrays must live on.
        self.state = jax.tree.map(
            lambda given, leaf: (
                np.array(leaf)
                if steps.on_host and isinstance(given, np.ndarray)
                else jnp.copy(loop.place(leaf))
            ),
            steps.state,
            state,
        )

    def alike(self) -> tuple:
        """Loops of which this is the same can run as one program."""
        steps = self.steps
        leaves, structure = jax.tree.flatten((steps.args, self.state))
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        alone = None if steps.together and not steps.on_host else id(self)
        same = steps.name, steps.num_steps, steps.every, self.step
        return (*same, structure, shapes, alone)

    def finite(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a chunk that ended at `step`, without those on divergence.

        Raises:
          DivergedError: something was not finite.
        """
        at = int(metrics.pop(DIVERGED_STEP, -1))
        client = int(metrics.pop(DIVERGED_CLIENT, -1))
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if at < 0 and client < 0 and not bad:
            return metrics
        loop, name = self.loop, self.steps.name
        when = f"in {name} {at + 1}" if at >= 0 else f"by {name} {step}"
        who = f"client {client}: " if client >= 0 else ""
        what = bad[0] if bad else "a parameter"
        raise errors.DivergedError(
            f"seed {loop.seed}, {loop.stage}, {when}: {who}{what} is not finite: lower"
            " the learning rate; the last finite state that was saved is kept"
        )

    def record(self, step: int, metrics: dict[str, float], note: str) -> None:
        """Add metrics to the run's records."""
        loop = self.loop
        loop.tracker.record(loop.stage, self.steps.name, step, metrics, note)

    def save(self) -> None:
        history = self.loop.tracker.history(self.loop.stage, self.steps.name)
        with Stopwatch.waits():
            self._saved.save(self.step, self.state, {"history": history})

    def close(self) -> None:
        self._saved.close()


def run_stage(loops: Sequence[Loop], runs: Sequence[Run]) -> list[Any]:
    """Bring a stage of one or more studies, equal but for the seed, to its end.

    What several ask for at the same time runs as one program, batched over seeds, if it
    is alike in shape and step.

    Raises:
      DivergedError: a metric is not finite.
      Interrupted: a signal came; the state is saved.
    """
    outcomes: dict[int, Any] = {}
    waiting: dict[int, _Running] = {}

    def proceed(i: int, state: Tree) -> None:
        try:
            waiting[i] = _Running(loops[i], runs[i].send(state))
        except StopIteration as end:
            outcomes[i] = end.value

    for i in range(len(runs)):
        proceed(i, None)
    while waiting:
        groups: dict[tuple, dict[int, _Running]] = {}
        for i, running in waiting.items():
            groups.setdefault(running.alike(), {})[i] = running
        waiting = {}
        for group in groups.values():
            _run(list(group.values()))
            for i, running in group.items():
                proceed(i, running.state)
    return [outcomes[i] for i in range(len(runs))]


def _run(group: Sequence[_Running]) -> None:
    """Bring loops that are alike to their last step.

    Chunks end at multiples of `every` whatever happened before, so a resumed run makes
    the same calls on the same states.
    """
    steps, loop, step = group[0].steps, group[0].loop, group[0].step
    program = _program(steps, loop.place)
    args = tuple(loop.place(one.steps.args) for one in group)
    samples = len(group) * steps.samples_per_step
    loop.progress.begin(loop.stage, steps.name, step, steps.num_steps, samples)
    last_save = time.monotonic()
    pending = None

    def report() -> None:
        if pending is None:
            return
        found = [tracking.to_python(metrics) for metrics in jax.device_get(pending[1])]
        found = [
            one.finite(pending[0], metrics)
            for one, metrics in zip(group, found, strict=True)
        ]
        note = loop.progress.update(pending[0], found[0], environment.memory_in_use())
        for one, metrics in zip(group, found, strict=True):
            one.record(pending[0], metrics, note)
            one.loop.time_sheet.write()

    try:
        while step < steps.num_steps:
            end = min(step + steps.every, steps.num_steps)
            # The second chunk compiles nothing; there may be but one.
            recorded = step == (steps.every if steps.num_steps > steps.every else 0)
            run = program
            if loop.profile and recorded:
                run = _traced(loop.profile / loop.stage / steps.name, program)
            states = tuple(one.state for one in group)
            states, metrics = run(args, states, step, end)
            # The previous chunk's metrics are read while this one computes.
            report()
            pending, step = (end, metrics), end
            for one, state in zip(group, states, strict=True):
                one.state, one.step = state, step
            if jax.process_count() > 1:
                # Else waiting for the others would look like it takes all the time.
                jax.block_until_ready(states)
            due = time.monotonic() - last_save >= loop.checkpoint_seconds
            signum = environment.highest(loop.interruption.signum)
            if signum or due or step == steps.num_steps:
                report()
                pending = None
                for one in group:
                    one.save()
                    one.loop.time_sheet.write(always=bool(signum))
                last_save = time.monotonic()
            if signum:
                raise Interrupted(signum)
    finally:
        loop.progress.end()
        for one in group:
            one.close()


def _program(
    steps: Steps, place: Callable[[Tree], Tree]
) -> Callable[..., tuple[Tree, Tree]]:
    """`(args, states, first, end) -> states, metrics` of one or more seeds.

    On the devices nothing is moved to or from them meanwhile.
    """
    chunk = steps.chunk

    def run(args: Tree, states: Tree, first: Any, end: Any) -> tuple[Tree, Tree]:
        if len(states) == 1:
            found = [chunk(args[0], states[0], first, end)]
        else:
            each = jax.vmap(chunk, (0, 0, None, None))(
                trees.stack(args), trees.stack(states), first, end
            )
            found = [trees.take(each, i) for i in range(len(states))]
        return tuple(zip(*found, strict=True))

    if steps.on_host:
        return run
    # By this name it is known in traces and in what jax tells of its compilation.
    run.__name__ = steps.name
    program = jax.jit(run, donate_argnames="states")

    def guarded(args: Tree, states: Tree, first: int, end: int) -> tuple[Tree, Tree]:
        window = place((np.int32(first), np.int32(end)))
        with jax.transfer_guard("disallow"):
            return program(args, states, *window)

    return guarded


def _traced(
    folder: pathlib.Path, program: Callable[..., tuple[Tree, Tree]]
) -> Callable[..., tuple[Tree, Tree]]:
    """`program`, recorded from its start until its results are there."""

    def run(*args: Any) -> tuple[Tree, Tree]:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            result = jax.block_until_ready(program(*args))
        _log.info("profile in %s", folder)
        return result

    return run
