"""Metrics on disk, TensorBoard events, progress bars and log lines."""

import json
import logging
import os
import pathlib
import time
from typing import Any

import absl.logging
import numpy as np
import tensorboardX
import tqdm

_log = logging.getLogger(__name__)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write atomically: readers see the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_python(metrics: dict[str, Any]) -> dict[str, float]:
    """Scalars of any array type as Python floats."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}


class Tracker:
    """Records of one run: `metrics.jsonl`, and TensorBoard where asked."""

    def __init__(
        self, workdir: pathlib.Path, *, tensorboard: bool, writes: bool = True
    ) -> None:
        """Append to what `workdir` holds, unless another process `writes`."""
        self._path = workdir / "metrics.jsonl"
        self._writes = writes
        self._writer = None
        if tensorboard and writes:
            self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def history(self, stage: str) -> list[dict[str, Any]]:
        """All records of `stage`, oldest first; half a last line is passed over."""
        return [record for record in self._records() if record["stage"] == stage]

    def keep_until(self, stage: str, loop: str, step: int) -> None:
        """Forget the records of `loop` past `step`, which a resumed run repeats."""

        def stays(record: dict[str, Any]) -> bool:
            same = record["stage"] == stage and record["loop"] == loop
            return not same or record["step"] <= step

        self._rewrite([record for record in self._records() if stays(record)])

    def replace(self, stage: str, history: list[dict[str, Any]]) -> None:
        """Make `history` the records of `stage` (of a reused stage)."""
        others = [record for record in self._records() if record["stage"] != stage]
        self._rewrite(others + history)

    def record(
        self, stage: str, loop: str, step: int, metrics: dict[str, float]
    ) -> None:
        """Append one record."""
        if not self._writes:
            return
        entry = {"stage": stage, "loop": loop, "step": step, "time": time.time()}
        with self._path.open("a") as file:
            file.write(json.dumps({**entry, **metrics}) + "\n")
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{stage}/{name}", value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        _log.info("%s %s %d  %s", stage, loop, step, text)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer:
            self._writer.close()

    def _records(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        records = []
        for line in self._path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by a kill
                continue
        return records

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        partial.replace(self._path)


class Progress:
    """A bar on a terminal, nothing elsewhere: loss, samples per second, time left."""

    def __init__(self, name: str, start: int, total: int, samples_per_step: int):
        """Begin at `start` of `total` steps."""
        self._bar = tqdm.tqdm(
            initial=start, total=total, desc=name, unit="step", disable=None
        )
        self._samples_per_step = samples_per_step

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show that `step` is done."""
        self._bar.update(step - self._bar.n)
        rate = self._bar.format_dict["rate"] or 0
        shown = {name: f"{value:.3g}" for name, value in list(metrics.items())[:2]}
        samples = f"{rate * self._samples_per_step:.0f} samples/s"
        self._bar.set_postfix(shown | {"": samples}, refresh=False)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def configure_logging() -> None:
    """The library's log lines on stderr; of other libraries only warnings."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    logger = logging.getLogger("mosaic_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
