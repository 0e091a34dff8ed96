"""Run directories as plain data: all that reports read, without images or devices."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from mosaic_jax.core import errors, files
from mosaic_jax.core.steps import ROUND
from mosaic_jax.fl import evaluation
from mosaic_jax.report import glossary
from mosaic_jax.run import checkpoint, store
from mosaic_jax.run import summary as summaries
from mosaic_jax.run.store import Record
from mosaic_jax.run.summary import Summary
from mosaic_jax.run.trained import FINAL
from mosaic_jax.stages import sections
from mosaic_jax.stages.sections import Section

_log = logging.getLogger(__name__)

Groups = dict[str, list["SavedRun"]]


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One finished study in its run directory.

    Attributes:
      path: the directory.
      settings: all of them, nested.
      command: that started it, by argument.
      revision: of the library's checkout; "" where it was installed.
      summary: what it found and cost.
      label_count: training images per client and class, [C, K] int.
      test_label: classes of the test images, [N] int.
      records: of each finished stage, in order.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    command: list[str]
    revision: str
    summary: Summary
    label_count: np.ndarray
    test_label: np.ndarray
    records: dict[str, Record]

    @property
    def title(self) -> str:
        """What was run, in a few words."""
        method = glossary.method(self.settings)
        return f"{method} on {self.summary.dataset}, seed {self.summary.seed}"

    def curve(self) -> dict[str, np.ndarray]:
        """The global model, or else the clients' own models, over federated rounds.

        Payloads in `sent_before` crossed before a stage's first round, all others
        evenly over its rounds; a stage without rounds sends everything at once.

        Returns:
          "round" [R], counted over the whole study, "bytes" [R] that all clients had
          sent by then, "accuracy" [R] on the test set, "stage" [R] names.
        """
        rows, first, sent = [], 0, 0.0
        for stage, record in self.records.items():
            total = sum(record.up.values())
            history = [
                row
                for row in record.history
                if row["loop"] == ROUND and "test_accuracy" in row
            ]
            if history:
                before = sum(record.up.get(name, 0) for name in record.sent_before)
                steps = history[-1]["step"]
                rows += [
                    (
                        first + row["step"],
                        sent + before + (total - before) * row["step"] / steps,
                        row["test_accuracy"],
                        stage,
                    )
                    for row in history
                ]
                first += steps
            sent += total
        names = ("round", "bytes", "accuracy", "stage")
        columns = zip(*rows, strict=True) if rows else ([] for _ in names)
        return {n: np.array(c) for n, c in zip(names, columns, strict=True)}

    def rate_accuracy(self) -> dict[str, float]:
        """Of the parts of the final model that clients of each rate hold; else {}."""
        found = [
            record.results.get("rate_accuracy") for record in self.records.values()
        ]
        return next((one for one in reversed(found) if one), {})

    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted classes [N] of the test images by each model, in order of time.

        A model that a later stage names again stands at its later place.
        """
        found: dict[str, np.ndarray] = {}
        for record in self.records.values():
            for name, model in record.models.items():
                if "predictions" in model:
                    found.pop(name, None)
                    found[name] = np.array(model["predictions"])
        return found

    def distinct_predictions(self) -> dict[str, np.ndarray]:
        """`predictions`, without "final" where it has the name of its stage as well."""
        found = self.predictions()
        final = found.pop(FINAL, None)
        if final is None or any(np.array_equal(final, one) for one in found.values()):
            return found
        return found | {FINAL: final}

    def confusion(self, model: str = FINAL) -> np.ndarray:
        """[K, K] int of test images: class (row) taken for class (column)."""
        num_classes = self.label_count.shape[1]
        predicted = self.predictions()[model]
        return evaluation.confusion(predicted, self.test_label, num_classes)

    def per_class(self, model: str = FINAL) -> np.ndarray:
        """[K] test accuracy within each class; NaN for one without images."""
        num_classes = self.label_count.shape[1]
        predicted = self.predictions()[model]
        return evaluation.per_class_accuracy(predicted, self.test_label, num_classes)

    def client_columns(self) -> dict[str, list[str]]:
        """Findings of all stages on each client, [C] by the column's name."""
        found: dict[str, dict[str, str]] = {}
        for record in self.records.values():
            for column, values in record.clients.items():
                found.setdefault(column, {}).update(values)
        numbers = [str(number) for number in range(len(self.label_count))]
        return {
            column: [values.get(number, "") for number in numbers]
            for column, values in found.items()
        }

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Name of the stage and what it shows, of each stage that shows something.

        Raises:
          DataError: it cannot be read.
        """
        for stage, record in self.records.items():
            if record.section is not None:
                try:
                    yield stage, sections.from_json(record.section)
                except ValueError as error:
                    where = _directory(self.path, self.summary, stage)
                    raise errors.DataError(f"{where}: {error}") from error

    def pictures(self, stage: str) -> dict[str, np.ndarray]:
        """Arrays that a stage left to be looked at; damaged ones are logged, and {}."""
        try:
            return store.pictures(_directory(self.path, self.summary, stage))
        except errors.CheckpointError as error:
            _log.warning("%s; the report is without it", error)
            return {}


def read(path: pathlib.Path) -> SavedRun:
    """The study in run directory `path`.

    Raises:
      DataError: a file is missing or damaged, or the run is of another version.
    """
    with _mendable():
        summary = summaries.read(path / "summary.json")
        split = _content(path / "split.json", ("label_counts", "held_out_labels"))
        config = _content(path / "config.json", ("settings", "command", "git_revision"))
        return SavedRun(
            path=path,
            settings=config["settings"],
            command=config["command"],
            revision=config["git_revision"],
            summary=summary,
            label_count=np.array(split["label_counts"]),
            test_label=np.array(split["held_out_labels"]["test"]),
            records={name: _record(path, summary, name) for name in summary.stages},
        )


def _content(path: pathlib.Path, names: Collection[str]) -> dict[str, Any]:
    """The JSON of a file, which must have all `names`."""
    found = files.read_json(path)
    if not set(names) <= set(found):
        raise errors.DataError(
            f"{path}: made by another version: its study must be run again, with its"
            " command"
        )
    return found


def _record(path: pathlib.Path, summary: Summary, stage: str) -> Record:
    """The record of a finished stage, which must be the one that it says it is."""
    directory = _directory(path, summary, stage)
    record = store.read_record(directory)
    expected = {"stage": stage, "fingerprint": directory.name, "seed": summary.seed}
    checkpoint.check_identity(directory, record.identity, expected)
    return record


def _directory(path: pathlib.Path, summary: Summary, stage: str) -> pathlib.Path:
    """Where a stage that the summary tells of lies."""
    files.child(files.child(path / "stages", stage), summary.stages[stage])
    return store.directory_of(path, stage, summary.stages[stage])


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    """Damage as a `DataError` that says how to mend it."""
    try:
        yield
    except errors.CheckpointError as error:
        reason = "the same command again mends it, or finishes the run"
        raise errors.DataError(f"{error}: {reason}") from error


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
            with _mendable():
                order = _content(path / listing, ("order",))["order"]
                return [files.child(path, name) for name in order]
    inner = sorted(one for one in path.glob("*") if _seeds_in(one))
    if not inner:
        missing = "" if path.is_dir() else "no such folder: "
        raise errors.DataError(
            f"{path}: {missing}must be a run directory, with a config.json"
        )
    return inner


def _seeds_in(path: pathlib.Path) -> list[pathlib.Path]:
    """Run directories of a study's seeds, in their order."""
    if (path / "config.json").exists():
        return [path]
    found = path.glob("seed_*/config.json")
    return sorted(
        (one.parent for one in found), key=lambda p: int(p.name.partition("_")[2])
    )
