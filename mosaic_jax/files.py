"""Files that are written whole or not at all, and tell when they were damaged."""

import hashlib
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from mosaic_jax import errors

CHECKSUM = "checksum"
# What a reader of JSON may raise on damage; of lists within lists, that they are deep.
UNREADABLE = (OSError, ValueError, TypeError, RecursionError, errors.CheckpointError)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as JSON has it (names are strings), and a checksum of it."""
    content = json.loads(json.dumps(content))
    return content | {CHECKSUM: _digest(content)}


def unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    """What was sealed.

    Raises:
      CheckpointError: it is not what it was.
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
    """Write with a checksum: readers see the old file or the new one."""
    write_bytes(path, json.dumps(seal(content), indent=indent).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What `write_json` wrote.

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
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz; zip files carry checksums of their own."""
    partial = _partial(path)
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

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
    """Check, before the work, that a file can be written.

    Args:
      field: that names it, for the message.
      path: of the file.
      suffixes: that it may have; any where none are given.

    Raises:
      ConfigError: its folder is missing, or its name is a folder's or ends wrongly.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        wanted = ", ".join(suffixes)
        raise errors.ConfigError(f"{field} = {path}: must end in one of {wanted}")
    if path.is_dir():
        raise errors.ConfigError(f"{field} = {path}: must be a file, not a folder")
    if not path.parent.is_dir():
        raise errors.ConfigError(f"{field} = {path}: must lie in a folder that exists")


def check_folder(field: str, path: pathlib.Path) -> None:
    """Check, before the work, that `path` is a folder or can become one.

    Raises:
      ConfigError: a file is in the way.
    """
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise errors.ConfigError(f"{field} = {path}: {there} is no folder")


def child(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder / name`, where a file told the name.

    Raises:
      CheckpointError: it leads elsewhere.
    """
    if name in ("", ".", "..") or pathlib.PurePath(name).name != name:
        raise errors.CheckpointError(f"{folder}: {name!r} is no name of a folder in it")
    return folder / name


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write so that readers see the old file or the new one."""
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
