"""Files that are written whole or not at all, with checksums that reveal damage."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.core.types import Array

CHECKSUM = "checksum"
# What reading damaged JSON may raise; RecursionError comes from deeply nested lists.
UNREADABLE = (OSError, ValueError, TypeError, RecursionError, errors.CheckpointError)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as JSON represents it (keys become strings), plus its checksum."""
    content = json.loads(json.dumps(content))
    return content | {CHECKSUM: _digest(content)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    """The content of a `seal`ed mapping, without its checksum.

    Raises:
      CheckpointError: the checksum does not match the content.
    """
    content = dict(sealed)
    if content.pop(CHECKSUM, None) != _digest(content):
        raise errors.CheckpointError("the checksum does not match")
    return content


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(
    path: pathlib.Path, content: dict[str, Any], *, indent: int | None = 2
) -> None:
    """Write JSON with a checksum; readers see either the old file or the new one.

    Args:
      path: of the file; its folder must exist.
      content: what JSON can represent.
      indent: spaces per level; None writes everything on one line.
    """
    write_bytes(path, json.dumps(seal(content), indent=indent).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    try:
        return unseal(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise errors.CheckpointError(f"{path}: is missing") from error
    except UNREADABLE as error:
        raise errors.CheckpointError(f"{path}: is damaged") from error


def sha256(path: pathlib.Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_arrays(
    path: pathlib.Path, arrays: Mapping[str, Array], *, compressed: bool = True
) -> None:
    """Write arrays by name as npz, a zip file, which carries checksums of its own.

    Args:
      path: of the file.
      arrays: by name.
      compressed: whether they take less room, and more time.
    """
    partial = _partial(path)
    with partial.open("wb") as file:
        named: dict[str, Any] = dict(arrays)
        (np.savez_compressed if compressed else np.savez)(file, **named)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays, by name, of a file that `write_arrays` wrote.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    if not path.exists():
        raise errors.CheckpointError(f"{path}: is missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds on damage
        raise errors.CheckpointError(f"{path}: is damaged") from error


def check_output(
    field: str, path: pathlib.Path, suffixes: Collection[str] = ()
) -> None:
    """Check, before a long computation, that a file can be written at its end.

    Args:
      field: name of the setting or option that holds the path, for the message.
      path: of the file.
      suffixes: allowed endings such as ".html"; none given: any ending.

    Raises:
      ConfigError: its folder is missing, or it names a folder or has another ending.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        wanted = ", ".join(suffixes)
        raise errors.ConfigError(f"{field} = {path}: must end in one of {wanted}")
    if path.is_dir():
        raise errors.ConfigError(f"{field} = {path}: must be a file, not a folder")
    if not path.parent.is_dir():
        raise errors.ConfigError(f"{field} = {path}: must lie in a folder that exists")


def is_url(place: str) -> bool:
    """Whether `place` is a URL, SCHEME://..., and no path."""
    return "://" in place


def cache() -> pathlib.Path:
    """The folder of this user for what can be made or fetched again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "mosaic_jax"


def check_folder(field: str, path: pathlib.Path) -> None:
    """Check, before a long computation, that `path` is a folder or can become one.

    Raises:
      ConfigError: `path`, or a parent of it, is a file, or was the URL of a store.
    """
    # A path has one slash of those of a URL.
    if re.match(r"[a-z][\w+.-]+:/", f"{path}/"):
        raise errors.ConfigError(
            f"{field} = {path}: must be a folder: URLs are for `mosaic run`, as"
            " --workdir and --reuse_from"
        )
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise errors.ConfigError(f"{field} = {path}: {there} is no folder")


def child(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder / name` for a name that was read from a file, hence not trusted.

    Raises:
      CheckpointError: the name leads out of `folder`.
    """
    if name in ("", ".", "..") or pathlib.PurePath(name).name != name:
        raise errors.CheckpointError(f"{folder}: {name!r} is no name of a folder in it")
    return folder / name


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write bytes; readers see either the old file or the new one."""
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
