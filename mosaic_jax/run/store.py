"""Finished stages on disk, with checks that they are what is looked for.

A stage is saved in `RUN/stages/NAME/FINGERPRINT`: its artifacts, its pictures, and its
record `done.json`, which is written last and has the checksums of the other files.
"""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mosaic_jax.core import errors, files, trees
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.run import checkpoint

_log = logging.getLogger(__name__)

RECORD, PICTURES = "done.json", "pictures.npz"
ARTIFACTS, CHECKPOINTS, TIMES = "artifacts", "checkpoints", "time.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """All about a finished stage but its artifacts; JSON can represent it.

    Attributes:
      identity: study, stage, fingerprint and seed that the files belong to.
      provides: names of the artifacts.
      models, results, headline, clients, up, down, sent_before: as in
        `stages.base.Outcome`.
      section: of the report, as by `stages.sections.to_json`; None: there is none.
      flops: see `Stage.flops`; 0: not known.
      history: metrics of each window of steps.
      seconds: that the stage took.
      time: these seconds by kind: "computing", "compiling", "waiting".
      peak_memory_bytes: of the device or this process, up to the end of the stage.
      files: sha256 of each file beside the record, by relative path.
    """

    identity: dict[str, Any]
    provides: list[str]
    models: dict[str, dict[str, Any]]
    results: dict[str, Any]
    headline: dict[str, dict[str, Any]]
    clients: dict[str, dict[str, str]]
    section: dict[str, Any] | None
    up: dict[str, int]
    down: dict[str, int]
    sent_before: list[str]
    flops: float
    history: list[dict[str, Any]]
    seconds: float
    time: dict[str, float]
    peak_memory_bytes: int
    files: dict[str, str]


def read_record(directory: pathlib.Path) -> Record:
    """The record of the finished stage in `directory`.

    Raises:
      CheckpointError: it is missing, damaged or from another version.
    """
    content = files.read_json(directory / RECORD)
    names = {field.name for field in dataclasses.fields(Record)}
    if set(content) != names:
        raise errors.CheckpointError(
            f"{directory / RECORD}: is damaged or of another version"
        )
    return Record(**content)


@dataclasses.dataclass(frozen=True)
class FinishedStage:
    """A finished stage on disk."""

    name: str
    directory: pathlib.Path
    record: Record

    def artifacts(self, template: Mapping[str, Tree]) -> dict[str, Tree]:
        """Load artifacts.

        Args:
          template: shapes and types of the artifacts to load, by name; an axis of -1
            has any length.

        Raises:
          CheckpointError: an artifact is damaged, missing or of other shapes or types.
        """
        if not template:
            return {}
        return trees.restore_into(dict(template), self.arrays(template))

    def arrays(self, names: Collection[str]) -> dict[str, Array]:
        """The arrays of artifacts by their path "ARTIFACT/...".

        Args:
          names: of the artifacts.

        Raises:
          CheckpointError: artifacts are damaged or missing.
        """
        saved = checkpoint.Checkpoints(self.directory / ARTIFACTS, self.record.identity)
        latest = saved.latest()
        saved.close()
        if latest is None:
            raise errors.CheckpointError(f"{self.directory}: artifacts are damaged")
        return {
            path: leaf
            for path, leaf in latest[1].items()
            if path.partition("/")[0] in names
        }


def directory_of(root: pathlib.Path, name: str, fingerprint: str) -> pathlib.Path:
    """The folder of a stage.

    Args:
      root: run directory.
      name: of the stage.
      fingerprint: of the stage.
    """
    return root / "stages" / name / fingerprint


def find(
    root: pathlib.Path, identity: Mapping[str, Any], provides: Collection[str]
) -> FinishedStage | None:
    """Look for a finished stage.

    Args:
      root: run directory.
      identity: of the stage, see `Study.identity`.
      provides: names of the artifacts that it must have.

    Returns:
      The stage. None if it is not there, lacks an artifact, or is damaged or of another
      identity, which is logged.
    """
    name = identity["stage"]
    directory = directory_of(root, name, identity["fingerprint"])
    if not (directory / RECORD).exists():
        return None
    try:
        record = read_record(directory)
        checkpoint.check_identity(directory, record.identity, identity)
        if record.files != _checksums(directory):
            raise errors.CheckpointError(
                f"{directory}: its files are not those it was saved with"
            )
    except errors.CheckpointError as error:
        _log.warning("%s; stage %s runs again", error, name)
        return None
    complete = set(provides) <= set(record.provides)
    return FinishedStage(name, directory, record) if complete else None


def copy(stage: FinishedStage, target: pathlib.Path) -> None:
    """Copy a finished stage to the folder `target`, which is never there in part."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Whoever finished it may be removing what it needed only while it ran.
    passing = shutil.ignore_patterns(CHECKPOINTS, TIMES)
    shutil.copytree(stage.directory, partial, ignore=passing)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def save_artifacts(
    directory: pathlib.Path, identity: Mapping[str, Any], artifacts: dict[str, Tree]
) -> None:
    """Write the artifacts of a stage; all processes of a run must call this.

    Args:
      directory: of the stage.
      identity: of the stage.
      artifacts: by name.

    Raises:
      CheckpointError: they cannot be written.
    """
    if artifacts:
        saved = checkpoint.Checkpoints(directory / ARTIFACTS, identity)
        saved.save(0, artifacts)
        saved.close()


def seal(
    directory: pathlib.Path, record: Record, pictures: Mapping[str, np.ndarray]
) -> Record:
    """Write pictures and record, which makes the stage a finished one.

    Files that the stage needed only while it ran are removed.

    Args:
      directory: of the stage; its artifacts are there already.
      record: of the stage, without `files`.
      pictures: arrays by name.

    Returns:
      The record with the checksums of the files.
    """
    if pictures:
        files.write_arrays(directory / PICTURES, pictures)
    record = dataclasses.replace(record, files=_checksums(directory))
    files.write_json(directory / RECORD, dataclasses.asdict(record))
    remove_passing(directory)
    return record


def remove_passing(directory: pathlib.Path) -> None:
    """Remove the files in the folder of a stage that it needed only while it ran."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    (directory / TIMES).unlink(missing_ok=True)


def pictures(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The pictures of a finished stage by name; {} if it has none.

    Raises:
      CheckpointError: they are damaged.
    """
    path = directory / PICTURES
    return files.read_arrays(path) if path.exists() else {}


def _checksums(directory: pathlib.Path) -> dict[str, str]:
    """sha256 of every file of a finished stage but its record, by relative path.

    Of the artifacts only the seal is listed: it has the checksums of their files, which
    are verified when these are read.
    """
    kept = [*directory.glob(f"{ARTIFACTS}/*/seal.json"), *directory.glob(PICTURES)]
    return {path.relative_to(directory).as_posix(): files.sha256(path) for path in kept}
