"""Pytrees on disk through orbax, each with checksums that are checked on the way back.

Orbax writes atomically but does not notice a flipped bit, and of a part that is missing
its readers print thousands of lines. So every step carries the sha256 of its files,
and a step that fails the check is passed over, unread, for the one before.
"""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from mosaic_jax import errors, files, trees
from mosaic_jax.types import Tree

_log = logging.getLogger(__name__)

# Bytes on disk beside a tree's own: its metadata, records of the run.
MARGIN = 200_000
# Written last into a step's folder: what the files there are.
SEAL = "seal.json"


class Checkpoints:
    """Numbered trees in one folder; the last two are kept."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        identity: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open or create `directory`.

        Args:
          directory: of the steps.
          identity: says, JSON-able, what the trees are of. A step that was saved under
            another identity is passed over like a damaged one.
        """
        self._directory = pathlib.Path(directory).resolve()
        self._identity = dict(identity)
        self._directory.mkdir(parents=True, exist_ok=True)
        # Trees are whole in every process: each reads for itself, one writes.
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
        """Write `tree` as number `step`, in place of an older writing of it.

        Of several processes the first alone writes. `notes` are kept beside it.

        Raises:
          CheckpointError: it cannot be written; what was saved before is still there.
        """
        if jax.process_index():
            return
        tree = jax.device_get(tree)
        self._check_space(step, trees.num_bytes(tree))
        if step in self._manager.all_steps():
            self._manager.delete(step)
        nested = flax.traverse_util.unflatten_dict(trees.flatten(tree), sep="/")
        folder = self._directory / str(step)
        # A step below the newest, which a damaged file can leave, needs force.
        try:
            self._manager.save(step, args=ocp.args.StandardSave(nested), force=True)
            content = {
                "identity": self._identity,
                "sha256": _sums(folder),
                "notes": notes or {},
            }
            files.write_json(folder / SEAL, content, indent=None)
        except Exception as error:  # orbax raises many kinds
            raise errors.CheckpointError(
                f"{self._directory}: step {step} cannot be saved: {_first_line(error)}"
            ) from error

    def latest(self) -> tuple[int, dict[str, jax.Array], dict[str, Any]] | None:
        """The newest step that is intact, None if none.

        Its number, its arrays by 'a/b/c' paths, its notes.

        Steps that are damaged or belong elsewhere are named in the log and deleted.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, *self._read(step)
            except Exception as error:  # orbax raises many kinds on damage
                told = str(error)
                if not isinstance(error, errors.ForeignError):
                    reason = _first_line(error)
                    told = f"{self._directory}/{step} is damaged ({reason})"
                _log.warning("%s", told)
                if jax.process_index() == 0:
                    shutil.rmtree(self._directory / str(step), ignore_errors=True)
                    self._manager.reload()
        return None

    def _check_space(self, step: int, needed: int) -> None:
        """Orbax, run out of space, tells it in pages of traces."""
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

    def _read(self, step: int) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        folder = self._directory / str(step)
        seal = files.read_json(folder / SEAL)
        check_identity(folder, seal.get("identity"), self._identity)
        if not seal["sha256"].items() <= _sums(folder).items():
            raise errors.CheckpointError("the checksums of its files do not match")
        tree = self._manager.restore(step, args=ocp.args.StandardRestore())
        return trees.flatten(tree), seal["notes"]


def restore_into(template: Tree, flat: dict[str, jax.Array]) -> Tree:
    """Put arrays named by path into the structure of `template`.

    Raises:
      CheckpointError: names, shapes or dtypes differ from the template's.
    """
    expected = trees.flatten(template)
    for name in sorted(expected.keys() | flat.keys()):
        if _kind(expected.get(name)) != _kind(flat.get(name)):
            raise errors.CheckpointError(
                f"{name}: saved {_kind(flat.get(name))}, expected"
                f" {_kind(expected.get(name))}"
            )
    state = _fill(flax.serialization.to_state_dict(template), flat, "")
    return flax.serialization.from_state_dict(template, state)


def check_identity(
    folder: pathlib.Path, found: Any, expected: Mapping[str, Any]
) -> None:
    """Check what the files in `folder` say that they are of.

    Raises:
      ForeignError: it is something else; names the first difference.
    """
    found = found if isinstance(found, Mapping) else {}
    for name, value in expected.items():
        if found.get(name) != value:
            raise errors.ForeignError(
                f"{folder}: belongs to another study: its {name} is"
                f" {found.get(name)!r}, not {value!r}"
            )


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """The sha256 of every file in a folder but its own seal, by its path there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SEAL:
            found[path.relative_to(folder).as_posix()] = files.sha256(path)
    return found


def _first_line(error: Exception) -> str:
    """Of a message; TensorStore's go on with its settings."""
    return errors.reason(error).split(" [")[0]


def _kind(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _fill(state: Any, flat: dict[str, jax.Array], path: str) -> Any:
    if not isinstance(state, dict):
        return flat[path]
    prefix = f"{path}/" if path else ""
    return {key: _fill(value, flat, prefix + key) for key, value in state.items()}
