"""A running loop of one seed: resumed, checked, recorded and saved."""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import errors, files, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT, DIVERGED_STEP, Steps
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.run import callbacks, checkpoint, environment, store, tracking
from mosaic_jax.run.callbacks import Callback, Round
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.stopwatch import Stopwatch, TimeSheet

_log = logging.getLogger(__name__)
# Begins the paths of what is saved of a window under way.
_TALLY = "tally/"


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loops of one stage of one study need besides their steps.

    Attributes:
      stage: name of the stage, for records.
      seed: of the study, for messages.
      directory: of the checkpoints while the stage runs.
      tracker: of the run.
      progress: of the run.
      interruption: tells between calls whether to stop.
      checkpoint_seconds: least number of seconds between two checkpoints.
      grace_seconds: in which a signal to stop is followed, about.
      place: puts arrays on the devices.
      identity: of the stage, for its checkpoints.
      time_sheet: of the stage.
      profile: folder for a trace of one call; None: no trace.
      callbacks: the user's, called after federated rounds.
      saved: called by all processes once checkpoints are written.
    """

    stage: str
    seed: int
    directory: pathlib.Path
    tracker: tracking.Tracker
    progress: tracking.Progress
    interruption: Interruption
    checkpoint_seconds: float
    grace_seconds: float
    place: Callable[[Tree], Tree]
    identity: Mapping[str, Any]
    time_sheet: TimeSheet
    profile: pathlib.Path | None = None
    callbacks: Sequence[Callback] = ()
    saved: Callable[[], None] = lambda: None


class Running:
    """A running loop of one seed: its `state` after `step` steps.

    `tally` is that of the window under way, see `core.steps.Work`.
    """

    def __init__(self, loop: Loop, steps: Steps) -> None:
        """Resume from the last checkpoint, or start at step 0."""
        self.loop, self.steps = loop, steps
        self._saved = checkpoint.Checkpoints(
            loop.directory / steps.name, {**loop.identity, "loop": steps.name}
        )
        self.step, history, state = 0, [], steps.state
        # The tally of a window that was under way, by path.
        self._under_way: dict[str, Array] = {}
        latest = self._saved.latest()
        if latest is not None:
            told = loop.stage, steps.name, latest[0]
            try:
                state, self._under_way = self._usable(*latest[1:])
            except errors.CheckpointError as error:
                _log.warning(
                    "%s %s: step %d was saved %s; it starts again", *told, error
                )
            else:
                self.step, history = latest[0], latest[2]["history"]
                _log.info("%s %s: resuming at step %d", *told)
        # Steps after the checkpoint run again: their records are removed.
        loop.tracker.replace(loop.stage, history, loop=steps.name)
        # Calls donate their state, but the caller still needs its arrays.
        self.state = jax.tree.map(
            lambda given, leaf: (
                np.array(leaf)
                if steps.work.on_host and isinstance(given, np.ndarray)
                else jnp.copy(loop.place(leaf))
            ),
            steps.state,
            state,
        )

    def _usable(
        self, saved: Mapping[str, Array], notes: Mapping[str, Any]
    ) -> tuple[Tree, dict[str, Array]]:
        """State and tally, the latter by path, that were saved.

        Raises:
          CheckpointError: it is of another layout, or of another version.
        """
        if notes["layout"] != self.steps.layout:
            raise errors.CheckpointError(
                "under another layout of the work (compute, devices, free memory)"
            )
        tally = {path: x for path, x in saved.items() if path.startswith(_TALLY)}
        others = {path: x for path, x in saved.items() if path not in tally}
        try:
            found = trees.restore_into({"state": self.steps.state}, others)
        except errors.CheckpointError as error:
            raise errors.CheckpointError(f"by another version ({error})") from error
        return found["state"], {path[len(_TALLY) :]: x for path, x in tally.items()}

    def begin(self, empty: Tree) -> None:
        """Begin a window, or go on with the one that was under way.

        Args:
          empty: the tally before a window; it is never donated.
        """
        self._empty = self.tally = empty
        if self._under_way:
            tally = trees.restore_into(empty, self._under_way)
            self.tally = self.loop.place(tally)

    @property
    def is_between(self) -> bool:
        """Whether no window is under way."""
        return self.step in (0, self.steps.window_end(self.step - 1))

    def alike(self) -> tuple:
        """A value that is equal for loops that can run as one program."""
        steps = self.steps
        leaves, structure = jax.tree.flatten((steps.args, self.state))
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        together = steps.together and not steps.work.on_host and not self.loop.callbacks
        alone = None if together else id(self)
        same = steps.name, steps.num_steps, steps.every, self.step
        return (*same, structure, shapes, alone)

    def finite(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Check that all is finite; returns the metrics that are recorded.

        Args:
          step: number of the step after the last one.
          metrics: of a window, or its first steps.

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
        """Add the metrics of a window to the run's records.

        Args:
          step: number of the step after the window.
          metrics: by name.
          note: end of the log line.
        """
        loop = self.loop
        loop.tracker.record(loop.stage, self.steps.name, step, metrics, note)

    def advance(self, step: int, state: Tree, tally: Tree) -> None:
        """The steps before `step` are done.

        Args:
          step: that was reached.
          state: after them.
          tally: of the window so far.
        """
        self.step, self.state = step, state
        self.tally = self._empty if self.is_between else tally

    def save(self) -> None:
        """Write a checkpoint, with the loop's records."""
        history = self.loop.tracker.history(self.loop.stage, self.steps.name)
        with Stopwatch.waits():
            notes = {"history": history, "layout": self.steps.layout}
            tree = {"state": self.state}
            if not self.is_between:
                tree["tally"] = self.tally
            self._saved.save(self.step, tree, notes)

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
