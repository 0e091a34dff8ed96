"""Metrics on disk, progress bars and log lines."""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import absl.logging
import numpy as np
import tqdm

from mosaic_jax.core.types import Array
from mosaic_jax.run import environment, pulse
from mosaic_jax.run.callbacks import Callback, told

_log = logging.getLogger(__name__)
# Most rows of pictures that are shown.
MOST_PICTURES = 40


def to_python(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalars of any array type as Python floats."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}


class Tracker:
    """Records of a run in `metrics.jsonl`, which callbacks are told as well."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        callbacks: Sequence[Callback] = (),
        settings: Mapping[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        """Continue the records in a run directory.

        Args:
          workdir: run directory.
          callbacks: are told what is recorded.
          settings: of the study by dotted name, for callbacks.
          writes: whether this process writes and tells; of several, one does.
        """
        self._path = workdir / "metrics.jsonl"
        self._writes = writes
        self._records = _read(self._path)
        if writes and self._path.exists() and not _is_whole(self._path):
            self._write_all()
        self._callbacks = callbacks if writes else ()
        self._results: dict[str, float] = {}
        self._tell("on_study_start", workdir, dict(settings or {}))

    def _tell(self, event: str, *given: Any) -> None:
        told(self._callbacks, event, *given)

    def history(self, stage: str, loop: str = "") -> list[dict[str, Any]]:
        """All records of a stage, or of one loop in it, oldest first."""
        return [record for record in self._records if _is_of(record, stage, loop)]

    def replace(
        self, stage: str, history: list[dict[str, Any]], *, loop: str = ""
    ) -> None:
        """Replace the records of a stage, or of one loop in it.

        Args:
          stage: name of the stage.
          history: the new records.
          loop: name of the loop; "": all loops of the stage.
        """
        if history == self.history(stage, loop):
            return
        kept = [row for row in self._records if not _is_of(row, stage, loop)]
        self._records = kept + history
        if self._writes:
            self._write_all()

    def _write_all(self) -> None:
        partial = self._path.with_suffix(".partial")
        lines = (json.dumps(record) + "\n" for record in self._records)
        partial.write_text("".join(lines))
        partial.replace(self._path)

    def record(
        self,
        stage: str,
        loop: str,
        step: int,
        metrics: dict[str, float],
        note: str = "",
    ) -> None:
        """Append a record, and log it.

        Args:
          stage: name of the stage.
          loop: name of the loop.
          step: number of the step after the recorded ones.
          metrics: scalars by name.
          note: end of the log line.
        """
        entry = {"stage": stage, "loop": loop, "step": step, "time": time.time()}
        self._records.append({**entry, **metrics})
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(self._records[-1]) + "\n")
        self._tell("on_record", stage, loop, step, metrics)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        _log.info("%s %s %d  %s  %s", stage, loop, step, text, note)

    def pictures(self, stage: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Show those of a stage's pictures that are images, uint8 [..., H, W, D]."""
        grids = {
            name: _grid(array)
            for name, array in arrays.items()
            if array.dtype == np.uint8 and array.ndim >= 4
        }
        if grids:
            self._tell("on_pictures", stage, grids)

    def parameters(
        self, stage: str, model: str, parameters: Mapping[str, Array]
    ) -> None:
        """Show the parameters of a model that a stage made.

        Args:
          stage: name of the stage.
          model: name of the model.
          parameters: of the model by name.
        """
        self._tell("on_parameters", stage, model, parameters)

    def results(self, numbers: Mapping[str, float]) -> None:
        """Show the study's final results by name, when the run ends."""
        self._results = dict(numbers)

    def close(self) -> None:
        """Tell callbacks that the run ends."""
        self._tell("on_study_end", self._results)


def _is_of(record: Mapping[str, Any], stage: str, loop: str) -> bool:
    """Whether a record is of `stage` and, unless `loop` is "", of that loop."""
    return record["stage"] == stage and loop in ("", record["loop"])


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Records of earlier processes, without lines that are cut off or damaged."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if {"stage", "loop", "step"} <= record.keys():
                records.append(record)
        except (ValueError, AttributeError, RecursionError):
            continue
    return records


def _is_whole(path: pathlib.Path) -> bool:
    """Whether every line is a record; one that is cut off would spoil the next."""
    content = path.read_bytes()
    return not content or (
        content.endswith(b"\n") and content.count(b"\n") == len(_read(path))
    )


def _grid(array: np.ndarray) -> np.ndarray:
    """Images [..., n, H, W, D] as one image [H', W', 3] with rows of n images."""
    rows = array.reshape(-1, *array.shape[-4:])
    grid = np.concatenate(
        [np.concatenate(list(row), axis=1) for row in rows[:MOST_PICTURES]]
    )
    return np.repeat(grid, 3, axis=-1) if grid.shape[-1] == 1 else grid


class Progress:
    """The progress of a run: a bar on a terminal, log lines and `progress.json`.

    The time left is estimated by FLOPs: those that are left, at the speed so far.
    """

    def __init__(
        self, workdirs: Sequence[pathlib.Path], flops: dict[str, float], *, writes: bool
    ) -> None:
        """No stage is finished yet.

        Args:
          workdirs: run directories of studies that run together.
          flops: of every stage by name, in order, over all these studies.
          writes: whether this process writes files.
        """
        self._paths = [path / "progress.json" for path in workdirs] if writes else []
        self._flops = flops
        self._skipped = self._computed = 0.0
        self._done: list[str] = []
        self._start = time.monotonic()
        self._now: dict[str, Any] = {}
        self._doing = ("preparing", self._start)
        self._bar: tqdm.tqdm | None = None

    def enter(self, stage: str) -> None:
        """Begin a stage that has to run."""
        self._now = {"stage": stage}
        self._does(f"{stage}: preparing and compiling")

    def alive(self) -> tuple[str, float]:
        """What the run is at, and since when by `time.monotonic`.

        Also renews the times of `progress.json`, by which others tell that it runs.
        """
        for path in self._paths:
            with contextlib.suppress(OSError):  # not written yet, or its folder is gone
                os.utime(path)
        return self._doing

    def _does(self, what: str) -> None:
        self._doing = (what, time.monotonic())
        self._write(state="running", doing=what, **self._now)

    def begin(
        self, stage: str, loop: str, step: int, num_steps: int, samples_per_step: int
    ) -> None:
        """Begin or resume a loop.

        Args:
          stage: name of the stage.
          loop: name of the loop.
          step: number of steps that are done.
          num_steps: of the whole loop.
          samples_per_step: training samples, over all studies.
        """
        self._now = {
            "stage": stage,
            "loop": loop,
            "step": step,
            "num_steps": num_steps,
        }
        self._first, self._samples_per_step = step, samples_per_step
        self._loop_start = time.monotonic()
        self._bar = environment.progress_bar(
            initial=step, total=num_steps, desc=f"{stage} {loop}"
        )
        self._does(
            f"{stage}: compiling, to begin with {loop} {step + 1} of {num_steps}"
        )

    def compiled(self) -> None:
        """The loop's program is there: until now its time says nothing of its speed."""
        now = time.monotonic()
        self._start += now - self._loop_start
        self._loop_start = now
        self._does(self._at(self._now["step"]))

    def _at(self, step: int) -> str:
        now = self._now
        following = min(step + 1, now["num_steps"])
        return f"{now['stage']}: at {now['loop']} {following} of {now['num_steps']}"

    def update(self, step: int, metrics: dict[str, float], memory: int) -> str:
        """Report progress within the loop.

        Args:
          step: number of steps that are done.
          metrics: of the last call, by name.
          memory: bytes in use.

        Returns:
          A note on speed, time left and memory, for the log line.
        """
        now, total = time.monotonic(), self._now["num_steps"]
        seconds = max(now - self._loop_start, 1e-9)
        steps = step - self._first
        rate = steps / seconds
        stage_left = (total - step) / rate if steps else None
        study_left = self._study_left(step, now)
        samples = rate * self._samples_per_step
        self._now["step"] = step
        self._doing = (self._at(step), now)
        self._write(
            state="running",
            doing=self._doing[0],
            **self._now,
            metrics=metrics,
            samples_per_second=samples,
            stage_seconds_left=stage_left,
            study_seconds_left=study_left,
            memory_bytes=memory,
        )
        note = (
            f"{samples:.0f} samples/s, left: stage {_clock(stage_left)}, study"
            f" {_clock(study_left)}, {memory / 1e9:.1f} GB"
        )
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            shown = {name: f"{value:.3g}" for name, value in list(metrics.items())[:2]}
            self._bar.set_postfix(shown | {"": note}, refresh=False)
        return note

    def end(self) -> None:
        """End the loop, finished or not."""
        if self._bar is not None:
            self._bar.close()
        self._does(f"{self._now['stage']}: compiling and computing what follows")

    def finished(self, stage: str, *, reused: bool) -> None:
        """Report a finished stage; `reused`: it did not run now."""
        self._done.append(stage)
        if reused:
            self._skipped += self._flops[stage]
            self._start = time.monotonic() if not self._computed else self._start
        else:
            self._computed += self._flops[stage]
        over = len(self._done) == len(self._flops)
        self._write(state="done" if over else "running", stage=stage)

    def stopped(self, state: str, why: str = "") -> None:
        """Report that the run ends early, as "interrupted" or "failed", and why."""
        self._write(state=state, why=why, **self._now)

    def _study_left(self, step: int, now: float) -> float | None:
        """Estimated seconds of the study; a stage is taken to have one loop only."""
        total, stage = self._now["num_steps"], self._flops[self._now["stage"]]
        here = stage * (step - self._first) / total
        done = self._computed + here
        if not done:
            return None
        left = sum(self._flops.values()) - self._skipped - self._computed
        left -= stage * step / total
        return left * (now - self._start) / done

    def _write(self, **content: Any) -> None:
        stages = {"stages": list(self._flops), "stages_done": self._done}
        content = {**stages, **content}
        for path in self._paths:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(content))
            partial.replace(path)


def _clock(seconds: float | None) -> str:
    """Seconds as H:MM:SS or M:SS; "?" if they are not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _AboveBars(logging.StreamHandler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # a closed terminal is no reason to stop
            self.handleError(record)


def configure_logging() -> None:
    """Show the library's log lines on stderr."""
    # Orbax would print the traces of errors that this library reports in one line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logger = logging.getLogger("mosaic_jax")
    handler = _AboveBars()
    handler.addFilter(pulse.Sparse(__name__))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
