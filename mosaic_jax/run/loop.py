"""The loop around jitted steps: checkpoints, resuming, metrics, interruption.

A stage is a generator that yields each loop as `Steps` and is sent the loop's final
state. So stages of several seeds can wait at the same point, and their loops can run as
one program.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mosaic_jax.core.errors import Interrupted
from mosaic_jax.core.steps import Metrics, Run
from mosaic_jax.core.types import Tree
from mosaic_jax.run import environment, tracking
from mosaic_jax.run.compiled import Compiled, traced
from mosaic_jax.run.pace import Pace
from mosaic_jax.run.running import Loop, Running

_log = logging.getLogger(__name__)
# Seconds between two pictures of a state.
SHOW_EVERY = 5.0
# Calls that may have to end after a signal: one that computes, and one that waits.
_UNDER_WAY = 2


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
    waiting: dict[int, Running] = {}

    def proceed(i: int, state: Tree) -> None:
        try:
            waiting[i] = Running(loops[i], runs[i].send(state))
        except StopIteration as end:
            outcomes[i] = end.value

    for i in range(len(runs)):
        proceed(i, None)
    while waiting:
        groups: dict[tuple, dict[int, Running]] = {}
        for i, running in waiting.items():
            groups.setdefault(running.alike(), {})[i] = running
        waiting = {}
        for group in groups.values():
            _Together(list(group.values())).run()
            for i, running in group.items():
                proceed(i, running.state)
    return [outcomes[i] for i in range(len(runs))]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a program, under way perhaps.

    Attributes:
      steps: number of its steps.
      end: number after the last of them.
      metrics: of each loop, of the window so far.
      measured: further metrics of each at the end of a window, else None.
      begin: when it was made, by `time.monotonic`; None: its time is known.
    """

    steps: int
    end: int
    metrics: Sequence[Metrics]
    measured: Sequence[Metrics] | None
    begin: float | None


class _Together:
    """Loops that are alike, run to their last step as one program.

    A window of steps is one call, or several where it would take too long to stop.
    """

    def __init__(self, group: Sequence[Running]) -> None:
        """The loops stand where they were saved, or at step 0."""
        self._group, self._steps, self._loop = group, group[0].steps, group[0].loop
        self._step = group[0].step
        self._compiled = Compiled(self._steps, self._loop.place)
        self._args = tuple(self._loop.place(running.steps.args) for running in group)
        empty = self._steps.work.empty(self._args[0], group[0].state)
        for running in group:
            running.begin(self._loop.place(empty))
        self._pace = Pace(self._loop.grace_seconds / _UNDER_WAY, self._steps.every)
        # The call whose metrics are not read yet, and when the one before it was over.
        self._pending: _Call | None = None
        self._over = self._saved = self._shown = time.monotonic()

    def run(self) -> None:
        """Run the loops.

        Raises:
          DivergedError: a metric or a parameter is not finite.
          Interrupted: a signal came; the state is saved.
        """
        steps, loop, group = self._steps, self._loop, self._group
        samples = len(group) * steps.samples_per_step
        loop.progress.begin(
            loop.stage, steps.name, self._step, steps.num_steps, samples
        )
        try:
            # A run that goes on from a checkpoint may have been about to end there.
            stops = self._step > 0 and group[0].is_between and group[0].stops()
            while self._step < steps.num_steps and not stops:
                self._show()
                self._advance()
                if loop.callbacks and group[0].is_between:
                    self._read()
                    stops = group[0].stops()
                self._save_if_due(ends=stops or self._step == steps.num_steps)
            if self._step < steps.num_steps:
                steps.ended.step = self._step
                told = loop.stage, steps.name, self._step
                _log.info("%s %s: ended by a callback at %d", *told)
        finally:
            loop.progress.end()
            for running in group:
                running.close()

    def _show(self) -> None:
        """Write what the states look like, from time to time.

        Here: the next call takes their memory. Of several processes none has all of it.
        """
        now = time.monotonic()
        if jax.process_count() == 1 and now - self._shown >= SHOW_EVERY:
            for running in self._group:
                running.show()
            self._shown = time.monotonic()

    def _advance(self) -> None:
        """Make a call, and read what the one before it found while it computes.

        One that may be long is waited for, so that none is made after it in vain.
        """
        first, group = self._step, self._group
        window_end = self._steps.window_end(first)
        end = min(first + self._pace.steps, window_end)
        is_whole = group[0].is_between and end == window_end
        begin: float | None = time.monotonic()
        states, tallies, metrics = self._program(first, end)(
            self._args,
            tuple(running.state for running in group),
            tuple(running.tally for running in group),
            first,
            end,
        )
        for running, state, tally in zip(group, states, tallies, strict=True):
            running.advance(end, state, tally)
        self._step = end
        waits = not (is_whole and self._pace.is_quick)
        if waits:
            self._read()
            jax.block_until_ready(metrics)
            self._pace.took(end - first, time.monotonic() - begin)
            begin = None
        measured = None
        if end == window_end:
            measured = self._compiled.measure(self._args, states)
        self._read()
        self._pending = _Call(end - first, end, metrics, measured, begin)
        if waits:
            self._read()
        elif jax.process_count() > 1:
            # Otherwise the call's time would count as waiting for the others.
            jax.block_until_ready(states)

    def _program(self, first: int, end: int) -> Callable[..., Any]:
        """The program for a call, which may be one that is traced."""
        steps, profile = self._steps, self._loop.profile
        # One that compiles nothing, if there is another.
        is_second = first == steps.every
        is_last = steps.num_steps <= steps.every and end == steps.num_steps
        if profile and (is_second or is_last):
            return traced(profile / self._loop.stage / steps.name, self._compiled.run)
        return self._compiled.run

    def _read(self) -> None:
        """Read the metrics of the call that is under way, if one is."""
        call, self._pending = self._pending, None
        if call is None:
            return
        loop, group = self._loop, self._group
        found = jax.device_get(call.metrics)
        if call.begin is not None:
            begin = max(call.begin, self._over)
            self._pace.took(call.steps, time.monotonic() - begin)
        measured = jax.device_get(call.measured) or [{}] * len(group)
        self._over = time.monotonic()
        each = [
            running.finite(call.end, tracking.to_python(metrics | further))
            for running, metrics, further in zip(group, found, measured, strict=True)
        ]
        note = loop.progress.update(call.end, each[0], environment.memory_in_use())
        for running, metrics in zip(group, each, strict=True):
            if call.measured is not None:
                running.record(call.end, metrics, note)
            running.loop.time_sheet.write()

    def _save_if_due(self, *, ends: bool) -> None:
        """Save the states if it is time to, or a signal came.

        All processes decide alike, and how long the next call is as well.

        Raises:
          Interrupted: a signal came.
        """
        loop = self._loop
        due = time.monotonic() - self._saved >= loop.checkpoint_seconds
        signum, due, fewest = environment.highest(
            loop.interruption.signum, int(due), -self._pace.steps
        )
        self._pace.steps = -fewest
        if signum or due or ends:
            self._read()
            for running in self._group:
                running.save()
                running.loop.time_sheet.write(always=bool(signum))
            loop.saved()
            self._saved = time.monotonic()
        if signum:
            raise Interrupted(signum)
