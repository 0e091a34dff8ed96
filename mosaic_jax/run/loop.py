"""The loop around jitted steps: checkpoints, resuming, metrics, interruption.

A stage is a generator that yields each loop as `Steps` and is sent the loop's final
state. So stages of several seeds can wait at the same point, and their loops can run as
one program.
"""

import dataclasses
import logging
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import errors, files, trees
from mosaic_jax.core.errors import Interrupted
from mosaic_jax.core.steps import DIVERGED_CLIENT, DIVERGED_STEP, Run, Steps
from mosaic_jax.core.types import Tree
from mosaic_jax.run import callbacks, checkpoint, environment, programs, store, tracking
from mosaic_jax.run.callbacks import Callback, Round
from mosaic_jax.run.stopwatch import Stopwatch, TimeSheet

_log = logging.getLogger(__name__)
# Seconds between two pictures of a state.
SHOW_EVERY = 5.0


class Interruption:
    """Records SIGINT, SIGTERM and SIGHUP; a second signal ends the process.

    A signal that the process was started to ignore, as by nohup, stays ignored. Only
    the main thread of a process can handle signals: in another none is recorded.
    """

    def __init__(self) -> None:
        """No signal has come yet."""
        self.signum = 0

    def __enter__(self) -> "Interruption":
        """Install the handlers."""
        handles = threading.current_thread() is threading.main_thread()
        self._previous = {
            signum: signal.signal(signum, self._handle)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if handles and signal.getsignal(signum) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Put the previous handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        self.signum = signum
        _log.warning("stopping after the current step; signal again to stop at once")
        programs.farewell()  # a second signal ends this process without a word
        signal.signal(signum, signal.SIG_DFL)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loops of one stage of one study need besides their steps.

    Attributes:
      stage: name of the stage, for records.
      seed: of the study, for messages.
      directory: of the checkpoints while the stage runs.
      tracker: of the run.
      progress: of the run.
      interruption: tells between chunks whether to stop.
      checkpoint_seconds: least number of seconds between two checkpoints.
      place: puts arrays on the devices.
      identity: of the stage, for its checkpoints.
      time_sheet: of the stage.
      profile: folder for a trace of one chunk; None: no trace.
      callbacks: the user's, called after federated rounds.
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
    callbacks: Sequence[Callback] = ()


class _Running:
    """A running loop of one seed: its `state` after `step` steps."""

    def __init__(self, loop: Loop, steps: Steps) -> None:
        """Resume from the last checkpoint, or start at step 0."""
        self.loop, self.steps = loop, steps
        self._saved = checkpoint.Checkpoints(
            loop.directory / steps.name, {**loop.identity, "loop": steps.name}
        )
        latest = self._saved.latest()
        self.step, state, history = 0, steps.state, []
        if latest is not None and latest[2]["layout"] != steps.layout:
            _log.warning(
                "%s %s: step %d was saved under another layout of the work (compute,"
                " log.every_steps, devices, free memory); it starts again",
                *(loop.stage, steps.name, latest[0]),
            )
            latest = None
        if latest is not None:
            self.step, history = latest[0], latest[2]["history"]
            state = trees.restore_into(state, latest[1])
            _log.info("%s %s: resuming at step %d", loop.stage, steps.name, self.step)
        # Steps after the checkpoint run again: their records are removed.
        loop.tracker.replace(loop.stage, history, loop=steps.name)
        # Chunks donate their state, but the caller still needs its arrays.
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
        """A value that is equal for loops that can run as one program."""
        steps = self.steps
        leaves, structure = jax.tree.flatten((steps.args, self.state))
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        together = steps.together and not steps.on_host and not self.loop.callbacks
        alone = None if together else id(self)
        same = steps.name, steps.num_steps, steps.every, self.step
        return (*same, structure, shapes, alone)

    def finite(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Check that a chunk stayed finite; returns the metrics that are recorded.

        Args:
          step: number of the step after the chunk.
          metrics: of the chunk.

        Raises:
          DivergedError: a metric or a parameter is not finite.
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
        """Add the metrics of a chunk to the run's records.

        Args:
          step: number of the step after the chunk.
          metrics: by name.
          note: end of the log line.
        """
        loop = self.loop
        loop.tracker.record(loop.stage, self.steps.name, step, metrics, note)

    def save(self) -> None:
        """Write a checkpoint, with the loop's records."""
        history = self.loop.tracker.history(self.loop.stage, self.steps.name)
        with Stopwatch.waits():
            notes = {"history": history, "layout": self.steps.layout}
            self._saved.save(self.step, self.state, notes)

    def show(self) -> None:
        """Write what the state looks like, for those who watch the run."""
        if self.steps.pictures and environment.is_primary():
            self.loop.directory.mkdir(parents=True, exist_ok=True)
            path = self.loop.directory / store.PICTURES
            with Stopwatch.waits():
                files.write_arrays(path, self.steps.pictures(self.state))

    def stops(self) -> bool:
        """Tell callbacks of the step that was reached; whether one ends the loop."""
        loop, steps = self.loop, self.steps

        def reached() -> Round:
            history = loop.tracker.history(loop.stage, steps.name)
            aside = ("stage", "loop", "step", "time")
            return Round(
                stage=loop.stage,
                number=self.step,
                of=steps.num_steps,
                metrics={k: v for k, v in history[-1].items() if k not in aside},
                history=history,
                state=self.state,
            )

        return callbacks.stops(loop.callbacks, steps.name, reached)

    def close(self) -> None:
        """Release the checkpoints."""
        self._saved.close()


def run_stage(loops: Sequence[Loop], runs: Sequence[Run]) -> list[Any]:
    """Run a stage of one or more studies that differ in their seed only.

    Loops that the studies reach at the same time run as one program, batched over
    seeds, if their shapes and steps are equal.

    Args:
      loops: what the stage's loops need, for each study.
      runs: the stage of each study, not yet started.

    Returns:
      What the stage returns, for each study.

    Raises:
      DivergedError: a metric or a parameter is not finite.
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
            _run_loops(list(group.values()))
            for i, running in group.items():
                proceed(i, running.state)
    return [outcomes[i] for i in range(len(runs))]


def _run_loops(group: Sequence[_Running]) -> None:
    """Run loops that are alike to their last step, as one program.

    Chunks always end at multiples of `every`, so a resumed run makes the same calls on
    the same states.
    """
    steps, loop, step = group[0].steps, group[0].loop, group[0].step
    program = _program(steps, loop.place)
    args = tuple(loop.place(running.steps.args) for running in group)
    samples = len(group) * steps.samples_per_step
    loop.progress.begin(loop.stage, steps.name, step, steps.num_steps, samples)
    last_save = last_shown = time.monotonic()
    pending, first_chunk = None, True

    def report() -> None:
        if pending is None:
            return
        at, arrays = pending
        each = [
            running.finite(at, tracking.to_python(metrics))
            for running, metrics in zip(group, jax.device_get(arrays), strict=True)
        ]
        note = loop.progress.update(at, each[0], environment.memory_in_use())
        for running, metrics in zip(group, each, strict=True):
            running.record(at, metrics, note)
            running.loop.time_sheet.write()

    try:
        # A run that goes on from its last checkpoint may have been about to end there.
        stops = step > 0 and group[0].stops()
        while step < steps.num_steps and not stops:
            # Here: the next chunk takes the memory of the state. Of several processes
            # none has all of it.
            if jax.process_count() == 1 and time.monotonic() - last_shown >= SHOW_EVERY:
                for running in group:
                    running.show()
                last_shown = time.monotonic()
            end = min(step + steps.every, steps.num_steps)
            # The second chunk is traced, as it compiles nothing; or the only one.
            traced = step == (steps.every if steps.num_steps > steps.every else 0)
            run = program
            if loop.profile and traced:
                run = _traced(loop.profile / loop.stage / steps.name, program)
            states = tuple(running.state for running in group)
            states, metrics = run(args, states, step, end)
            if first_chunk and not steps.on_host:
                loop.progress.compiled()
            first_chunk = False
            # The previous chunk's metrics are read while this one computes.
            report()
            pending, step = (end, metrics), end
            for running, state in zip(group, states, strict=True):
                running.state, running.step = state, step
            if jax.process_count() > 1:
                # Otherwise the chunk's time would count as waiting for the others.
                jax.block_until_ready(states)
            if loop.callbacks:
                report()
                pending = None
                stops = group[0].stops()
            due = time.monotonic() - last_save >= loop.checkpoint_seconds
            signum = environment.highest(loop.interruption.signum)
            if signum or due or stops or step == steps.num_steps:
                report()
                pending = None
                for running in group:
                    running.save()
                    running.loop.time_sheet.write(always=bool(signum))
                last_save = time.monotonic()
            if signum:
                raise Interrupted(signum)
        if step < steps.num_steps:
            steps.ended.step = step
            _log.info("%s %s: ended by a callback at %d", loop.stage, steps.name, step)
    finally:
        loop.progress.end()
        for running in group:
            running.close()


def _program(
    steps: Steps, place: Callable[[Tree], Tree]
) -> Callable[..., tuple[Tree, Tree]]:
    """A chunk of one or more seeds: `(args, states, first, end) -> states, metrics`.

    Unless it runs on the host, nothing is moved to or from the devices meanwhile.
    """
    chunk = steps.chunk

    def run(args: Tree, states: Tree, first: Any, end: Any) -> tuple[Tree, Tree]:
        if len(states) == 1:
            results = [chunk(args[0], states[0], first, end)]
        else:
            each = jax.vmap(chunk, (0, 0, None, None))(
                trees.stack(args), trees.stack(states), first, end
            )
            results = [trees.take(each, i) for i in range(len(states))]
        states, metrics = zip(*results, strict=True)
        return states, metrics

    if steps.on_host:
        return run
    # The program's name in traces and in JAX's events of compilation.
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
    """`program`, recorded by JAX's profiler until its results are there."""

    def run(*args: Any) -> tuple[Tree, Tree]:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            result = jax.block_until_ready(program(*args))
        _log.info("profile in %s", folder)
        return result

    return run
