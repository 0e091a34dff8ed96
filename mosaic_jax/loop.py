"""The one loop around jitted steps: checkpoints, resume, metrics, interruption."""

import dataclasses
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax import checkpoint, environment, errors, tracking
from mosaic_jax.types import Tree

_log = logging.getLogger(__name__)

# (state, first step, end) -> state, scalar metrics
Chunk = Callable[[Tree, int, int], tuple[Tree, dict[str, Any]]]


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int) -> None:
        """Remember the signal, which sets the exit code."""
        super().__init__(f"interrupted by {signal.Signals(signum).name}; state saved")
        self.signum = signum


class Interruption:
    """Notes SIGINT and SIGTERM while entered; a second one takes its usual course."""

    def __init__(self) -> None:
        """Not asked to stop yet."""
        self.signum = 0

    def __enter__(self) -> "Interruption":
        """Install the handlers."""
        self._previous = {
            signum: signal.signal(signum, self._handle)
            for signum in (signal.SIGINT, signal.SIGTERM)
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


@dataclasses.dataclass(frozen=True)
class Loop:
    """Runs chunks of steps for one stage.

    Attributes:
      stage: its name, for records.
      directory: where checkpoints go while it runs.
      tracker: of the run.
      interruption: asked between chunks.
      checkpoint_seconds: least time between two checkpoints.
      place: puts a state on the devices.
      profile: folder for a trace of one chunk, None for none.
    """

    stage: str
    directory: pathlib.Path
    tracker: tracking.Tracker
    interruption: Interruption
    checkpoint_seconds: float
    place: Callable[[Tree], Tree]
    profile: pathlib.Path | None = None

    def __call__(
        self,
        name: str,
        chunk: Chunk,
        state: Tree,
        num_steps: int,
        *,
        every: int,
        samples_per_step: int,
    ) -> Tree:
        """Bring `state` from step 0, or the last checkpoint, to `num_steps`.

        Chunks end at multiples of `every` whatever happened before, so a resumed run
        makes the same calls on the same states.

        Args:
          name: of this loop within its stage.
          chunk: runs steps first..end - 1; must not depend on earlier chunks but
            through `state`.
          state: at step 0.
          num_steps: in all.
          every: steps in a chunk.
          samples_per_step: for the progress bar.

        Raises:
          DivergedError: a metric is not finite.
          Interrupted: a signal came; the state is saved.
        """
        saved = checkpoint.Checkpoints(self.directory / name)
        step, state = self._resume(saved, name, state)
        # Chunks donate their state; the caller's arrays must live on.
        state = jax.tree.map(jnp.copy, self.place(state))
        bar = tracking.Progress(
            f"{self.stage} {name}", step, num_steps, samples_per_step
        )
        last_save = time.monotonic()
        pending = None
        try:
            while step < num_steps:
                end = min(step + every, num_steps)
                # The second chunk compiles nothing; there may be but one.
                recorded = self.profile and step == (every if num_steps > every else 0)
                run = self._traced(name, chunk) if recorded else chunk
                state, metrics = run(state, step, end)
                # The previous chunk's metrics are read while this one computes.
                self._report(name, bar, pending)
                pending, step = (end, metrics), end
                due = time.monotonic() - last_save >= self.checkpoint_seconds
                signum = environment.highest(self.interruption.signum)
                if signum or due or step == num_steps:
                    self._report(name, bar, pending)
                    pending = None
                    saved.save(step, state)
                    last_save = time.monotonic()
                if signum:
                    raise Interrupted(signum)
        finally:
            bar.close()
            saved.close()
        return state

    def _traced(self, name: str, chunk: Chunk) -> Chunk:
        """`chunk`, recorded from its start until its results are there."""
        folder = self.profile / self.stage / name

        def run(state: Tree, first: int, end: int) -> tuple[Tree, dict[str, Any]]:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                result = jax.block_until_ready(chunk(state, first, end))
            _log.info("profile of %s %s in %s", self.stage, name, folder)
            return result

        return run

    def _resume(
        self, saved: checkpoint.Checkpoints, name: str, state: Tree
    ) -> tuple[int, Tree]:
        latest = saved.latest()
        step = 0
        if latest is not None:
            step = latest[0]
            state = checkpoint.restore_into(state, latest[1])
            _log.info("%s %s: resuming at step %d", self.stage, name, step)
        self.tracker.keep_until(self.stage, name, step)
        return step, state

    def _report(self, name: str, bar: tracking.Progress, pending) -> None:
        if pending is None:
            return
        step, metrics = pending
        metrics = tracking.to_python(jax.device_get(metrics))
        for metric, value in metrics.items():
            if not math.isfinite(value):
                raise errors.DivergedError(
                    f"{self.stage}: {metric} = {value} by {name} {step}: lower the"
                    " learning rate; the last finite state is saved"
                )
        self.tracker.record(self.stage, name, step, metrics)
        bar.update(step, metrics)
