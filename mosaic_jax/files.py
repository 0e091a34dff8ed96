"""Files that are written whole or not at all, and tell when they were damaged."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from mosaic_jax import errors

CHECKSUM = "checksum"


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
    _write(path, json.dumps(seal(content), indent=indent).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    try:
        return unseal(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise errors.CheckpointError(f"{path}: is missing") from error
    except (OSError, ValueError, TypeError, errors.CheckpointError) as error:
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


def child(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder / name`, where a file told the name.

    Raises:
      CheckpointError: it leads elsewhere.
    """
    if name in ("", ".", "..") or pathlib.PurePath(name).name != name:
        raise errors.CheckpointError(f"{folder}: {name!r} is no name of a folder in it")
    return folder / name


def _write(path: pathlib.Path, data: bytes) -> None:
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
