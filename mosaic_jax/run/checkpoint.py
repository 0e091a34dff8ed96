"""Checkpoints of pytrees by orbax, with checksums that are verified before reading.

Orbax writes atomically, but it does not notice a flipped bit, and it reports a missing
file in thousands of lines. So every checkpoint has the sha256 of its files. One that
does not match is not read; the checkpoint before it is used instead.

Of several processes each writes a part of the arrays. The first writes the seal once
all are there, with the checksums of every part: without it there is no checkpoint. Any
number of processes reads it.
"""

import logging
import pathlib
import shutil
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from mosaic_jax.core import errors, files, trees
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.run import processes

_log = logging.getLogger(__name__)

# Bytes on disk that are kept free for metadata and for records of the run.
MARGIN = 200_000
# Written last into a step's folder: identity, notes and checksums of its files, and of
# the parts that other processes wrote.
SEAL = "seal.json"


class Checkpoints:
    """Trees by step number in one folder; the last two are kept."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        identity: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open or create `directory`.

        Args:
          directory: of the checkpoints.
          identity: what the trees belong to, as JSON can represent it. A checkpoint of
            another identity is not read, like a damaged one.
        """
        self._directory = pathlib.Path(directory).resolve()
        self._identity = dict(identity)
        self._directory.mkdir(parents=True, exist_ok=True)
        # This process reads for itself; the first one's part is the folder.
        me = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, tree: Tree, notes: dict[str, Any] | None = None) -> None:
        """Write a tree; all processes must call this, each writes a part of it.

        Args:
          step: number of the checkpoint; an older one of this number is replaced.
          tree: of arrays.
          notes: what is saved with it, as JSON can represent it.

        Raises:
          CheckpointError: the tree cannot be written; older checkpoints are kept.
        """
        me = jax.process_index()
        part = shares(trees.flatten(tree), jax.process_count())[me]
        part = jax.device_get(part)
        self._check_space(step, trees.num_bytes(part))
        try:
            # Those of the first process, whose folder may be another one.
            steps = processes.exchange(list(self._manager.all_steps()))[0]
            digest = self._write_part(me, step, part, steps) if me else ""
            if me == 0:
                self._write(step, part)
            _, *parts = processes.exchange(digest)
            if me == 0:
                folder = self._directory / str(step)
                content = {
                    "identity": self._identity,
                    "sha256": _checksums(folder),
                    "parts": parts,
                    "notes": notes or {},
                }
                files.write_json(folder / SEAL, content, indent=None)
        except Exception as error:  # orbax raises many kinds
            raise errors.CheckpointError(
                f"{self._directory}: step {step} cannot be saved: {_first_line(error)}"
            ) from error

    def _write(self, step: int, arrays: dict[str, Array]) -> None:
        """Write the first part, by path."""
        if step in self._manager.all_steps():
            self._manager.delete(step)
        nested = flax.traverse_util.unflatten_dict(arrays, sep="/")
        # Without force, orbax refuses a step below the newest. Such a one is left when
        # the newest was damaged.
        self._manager.save(step, args=ocp.args.StandardSave(nested), force=True)

    def _write_part(
        self, number: int, step: int, arrays: dict[str, Array], steps: Collection[int]
    ) -> str:
        """Write another part, keeping older ones of `steps` alone; its sha256."""
        path = self._part(number, step)
        path.parent.mkdir(exist_ok=True)
        for old in path.parent.glob("*.npz"):
            if old.stem not in map(str, steps):
                old.unlink()
        files.write_arrays(path, arrays, compressed=False)
        return files.sha256(path)

    def _part(self, number: int, step: int) -> pathlib.Path:
        """File of the part that process `number` >= 1 writes."""
        return self._directory / f"part_{number}" / f"{step}.npz"

    def latest(self) -> tuple[int, dict[str, Array], dict[str, Any]] | None:
        """The newest checkpoint that is intact.

        Damaged checkpoints, and those of another identity, are logged and deleted.

        Returns:
          Its step, its arrays by 'a/b/c' paths, and its notes; None if there is none.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, *self._read(step)
            except Exception as error:  # orbax raises many kinds on damage
                message = str(error)
                if not isinstance(error, errors.ForeignError):
                    reason = _first_line(error)
                    message = f"{self._directory}/{step} is damaged ({reason})"
                _log.warning("%s", message)
                if jax.process_index() == 0:
                    shutil.rmtree(self._directory / str(step), ignore_errors=True)
                    self._manager.reload()
        return None

    def _check_space(self, step: int, needed: int) -> None:
        """Report a full disk in one line; orbax would do it in pages of traces."""
        free = shutil.disk_usage(self._directory).free
        if free < needed + MARGIN:
            raise errors.CheckpointError(
                f"{self._directory}: no space left on the disk for step {step}:"
                f" {(needed + MARGIN) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are"
                " free"
            )

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()

    def _read(self, step: int) -> tuple[dict[str, Array], dict[str, Any]]:
        folder = self._directory / str(step)
        seal = files.read_json(folder / SEAL)
        check_identity(folder, seal.get("identity"), self._identity)
        if not seal["sha256"].items() <= _checksums(folder).items():
            raise errors.CheckpointError("the checksums of its files do not match")
        tree = self._manager.restore(step, args=ocp.args.StandardRestore())
        found = trees.flatten(tree)
        # Checkpoints of earlier versions have no parts.
        for number, digest in enumerate(seal.get("parts", []), 1):
            path = self._part(number, step)
            if not path.exists() or files.sha256(path) != digest:
                raise errors.CheckpointError(f"the checksum of part {number} differs")
            found |= files.read_arrays(path)
        return found, seal["notes"]


def shares(arrays: Mapping[str, Array], count: int) -> list[dict[str, Array]]:
    """Arrays by path, dealt to `count` processes, about as many bytes to each.

    The first gets those of types that are not NumPy's own.
    """
    parts, load = [{} for _ in range(count)], [0] * count
    for path in sorted(arrays, key=lambda path: (-arrays[path].nbytes, path)):
        least = load.index(min(load)) if arrays[path].dtype.isbuiltin == 1 else 0
        parts[least][path] = arrays[path]
        load[least] += arrays[path].nbytes
    return parts


def check_identity(
    folder: pathlib.Path, saved: Any, expected: Mapping[str, Any]
) -> None:
    """Check that files belong to what is expected.

    Args:
      folder: of the files, for the message.
      saved: their identity as it was read from disk.
      expected: what it must be; `saved` may have further entries.

    Raises:
      ForeignError: they belong to something else; names the first difference.
    """
    saved = saved if isinstance(saved, Mapping) else {}
    for name, value in expected.items():
        if saved.get(name) != value:
            raise errors.ForeignError(
                f"{folder}: belongs to another study: its {name} is"
                f" {saved.get(name)!r}, not {value!r}"
            )


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """The sha256 of every file in a folder, except its seal, by relative path."""
    result = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SEAL:
            result[path.relative_to(folder).as_posix()] = files.sha256(path)
    return result


def _first_line(error: Exception) -> str:
    """The reason of an error, without the settings that TensorStore adds to it."""
    return errors.reason(error).split(" [")[0]
