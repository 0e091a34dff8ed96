"""Run directories as plain data: all that reports read, without images or devices."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mosaic_jax import checkpoint, errors, evaluation, files

_log = logging.getLogger(__name__)

# The federated rounds of a study, in order.
ROUND_STAGES = ("init", "warmup", "finetune")
# What clients send in them; all else is sent before.
PER_ROUND = ("models", "moments", "used_label_counts")

Groups = dict[str, list["Run"]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One study in its run directory.

    Attributes:
      path: the directory.
      config: the settings, nested.
      summary: the content of summary.json.
      split: the content of split.json.
      records: done.json of each finished stage, in order.
    """

    path: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any]
    split: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        """What was run, in a few words."""
        method = self.config["method"]
        if method == "federated":
            server = self.config["server"]["method"]
            method = self.config["init"]["method"] if server == "none" else server
        return f"{method} on {self.config['data']['name']}, seed {self.config['seed']}"

    @property
    def label_count(self) -> np.ndarray:
        """Training images per client and class, [C, K]."""
        return np.array(self.split["label_counts"])

    def results(self, stage: str) -> dict[str, Any]:
        """Findings of a stage, {} where it was not run."""
        return self.records.get(stage, {}).get("results", {})

    def curve(self) -> dict[str, np.ndarray]:
        """The global model over federated rounds.

        Returns:
          "round" [R], counted over the whole study, "bytes" [R] that all clients had
          sent by then, "accuracy" [R] on the test set, "stage" [R] names.
        """
        rows, first, sent = [], 0, 0.0
        for stage, record in self.records.items():
            up = record["up"]
            total = sum(up.values())
            in_rounds = sum(up.get(name, 0) for name in PER_ROUND)
            before = total - in_rounds
            history = [r for r in record["history"] if r["loop"] == "round"]
            steps = history[-1]["step"] if history else 0
            if stage in ROUND_STAGES:
                for r in history:
                    part = in_rounds * r["step"] / steps
                    rows.append(
                        (
                            first + r["step"],
                            sent + before + part,
                            r["test_accuracy"],
                            stage,
                        )
                    )
                first += steps
            sent += total
        names = ("round", "bytes", "accuracy", "stage")
        columns = zip(*rows, strict=True) if rows else ([] for _ in names)
        return {n: np.array(c) for n, c in zip(names, columns, strict=True)}

    def rate_accuracy(self) -> dict[str, float]:
        """Of the parts of the final model that clients of each rate hold; else {}."""
        found = [self.results(stage) for stage in ROUND_STAGES]
        found = [one["rate_accuracy"] for one in found if "rate_accuracy" in one]
        return found[-1] if found else {}

    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted classes [N] of the test images by each model, in order of time."""
        found = {}
        for name, stage in (
            ("init", "init"),
            ("warmup", "warmup"),
            ("teacher", "meta"),
            ("distilled", "distill"),
            ("distilled", "server"),
            ("final", "finetune"),
        ):
            results = self.results(stage)
            results = results.get("teacher", {}) if stage == "meta" else results
            if "predictions" in results:
                found[name] = np.array(results["predictions"])
        return found

    def confusion(self, model: str) -> np.ndarray:
        """[K, K] int of test images: class (row) taken for class (column)."""
        label = np.array(self.split["held_out_labels"]["test"])
        return evaluation.confusion(
            self.predictions()[model], label, self.label_count.shape[1]
        )

    def per_class(self, model: str) -> np.ndarray:
        """[K] test accuracy within each class; NaN for one without images."""
        matrix = self.confusion(model)
        total = matrix.sum(axis=1)
        return np.where(total > 0, np.diag(matrix) / np.maximum(total, 1), np.nan)

    def pictures(self, stage: str) -> dict[str, np.ndarray]:
        """Arrays that the stage left to be looked at; {} where there are none."""
        if stage not in self.records:
            return {}
        path = _stage(self.path, self.summary, stage) / "pictures.npz"
        if not path.exists():
            return {}
        try:
            return files.read_arrays(path)
        except errors.CheckpointError as error:
            _log.warning("%s; the report is without it", error)
            return {}


def read(path: pathlib.Path) -> Run:
    """The study in run directory `path`.

    Raises:
      DataError: a file is missing or damaged, or the run is of another version.
    """
    summary = _load(path / "summary.json")
    split = _load(path / "split.json")
    if "stages" not in summary or "held_out_labels" not in split:
        raise errors.DataError(
            f"{path}: made by an earlier version: must be run again with its command"
        )
    records = {stage: _record(path, summary, stage) for stage in summary["stages"]}
    config = _load(path / "config.json")["settings"]
    return Run(path, config, summary, split, records)


def _record(path: pathlib.Path, summary: dict[str, Any], stage: str) -> dict[str, Any]:
    """The record of a finished stage, which must be the one that it says it is."""
    folder = _stage(path, summary, stage)
    record = _load(folder / "done.json")
    expected = {"stage": stage, "fingerprint": folder.name, "seed": summary["seed"]}
    try:
        checkpoint.check_identity(folder, record.get("identity"), expected)
    except errors.CheckpointError as error:
        raise errors.DataError(str(error)) from error
    return record


def _stage(path: pathlib.Path, summary: dict[str, Any], stage: str) -> pathlib.Path:
    """Where a stage that the summary tells of lies."""
    folder = files.child(path / "stages", stage)
    return files.child(folder, summary["stages"][stage])


def collect(paths: Sequence[pathlib.Path]) -> Groups:
    """Runs by name; seeds of the same study are one group.

    A path is a run directory, or one of several seeds, a comparison or a sweep, which
    stands for all in it.

    Raises:
      DataError: nothing is there.
    """
    groups: Groups = {}
    for path in paths:
        for folder in _studies_in(path):
            name = str(folder.relative_to(path)) if folder != path else path.name
            if name in groups:
                name = str(folder)
            groups[name] = [read(seed) for seed in _seeds_in(folder)]
    return groups


def _studies_in(path: pathlib.Path) -> list[pathlib.Path]:
    """Folders of one study each, of one or more seeds."""
    if _seeds_in(path):
        return [path]
    for listing in ("comparison.json", "sweep.json"):
        if (path / listing).exists():
            return [files.child(path, name) for name in _load(path / listing)["order"]]
    inner = sorted(one for one in path.glob("*") if _seeds_in(one))
    if not inner:
        raise errors.DataError(f"{path}: must be a run directory, with a summary.json")
    return inner


def _seeds_in(path: pathlib.Path) -> list[pathlib.Path]:
    if (path / "config.json").exists():
        return [path]
    found = path.glob("seed_*/config.json")
    return sorted(
        (one.parent for one in found), key=lambda p: int(p.name.partition("_")[2])
    )


def _load(path: pathlib.Path) -> Any:
    try:
        return files.read_json(path)
    except errors.CheckpointError as error:
        reason = "the same command again mends it, or finishes the run"
        raise errors.DataError(f"{error}: {reason}") from error
