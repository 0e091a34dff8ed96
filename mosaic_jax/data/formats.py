"""Arrays in idx and npz files, read only after their headers were checked."""

import dataclasses
import gzip
import math
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.data import limits
from mosaic_jax.data.archives import reading

# Functions that read the header of an npy file, by version of the format.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def gunzip_idx(path: pathlib.Path) -> bytes:
    """Decompress an idx file, no further than its header says that the array goes.

    Raises:
      DataError: it is not such a file, or the array would not fit in memory.
    """
    with reading(path), gzip.open(path) as file:
        header = file.read(4)
        header += file.read(4 * _idx_rank(header))
        size = math.prod(_idx_shape(header))
        limits.check(path, size)
        # A byte past the end, if there is one, makes `idx` refuse the content.
        return header + file.read(size + 1)


def idx(path: pathlib.Path, content: bytes) -> np.ndarray:
    """The uint8 array of an idx file: bytes 0, 0, 8, rank, big-endian sizes, values.

    Raises:
      DataError: `content` is something else; the message names `path`.
    """
    with reading(path):
        shape = _idx_shape(content)
        body = np.frombuffer(content, np.uint8, -1, 4 + 4 * len(shape))
        if body.size != math.prod(shape):
            raise ValueError(f"{body.size} bytes for an array of {shape}")
        return body.reshape(shape)


def _idx_rank(content: bytes) -> int:
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("not an idx file of bytes")
    return content[3]


def _idx_shape(content: bytes) -> tuple[int, ...]:
    rank = _idx_rank(content)
    if len(content) < 4 + 4 * rank:
        raise ValueError("ends within its header")
    return tuple(np.frombuffer(content, ">u4", rank, 4).tolist())


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and type of an array, as the header of an npy file gives them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


def npz_headers(path: pathlib.Path) -> dict[str, Header]:
    """Shape and type of each array of an npz file by name; no array is read.

    Raises:
      DataError: the file cannot be read, or a header contradicts the size of its array.
    """
    found = {}
    with reading(path):
        limits.regular(path)
    with reading(path), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as file:
                shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
                found[name] = Header(shape, dtype)
                whole = file.tell() + found[name].num_bytes == entry.file_size
            if not whole and not dtype.hasobject:
                raise ValueError(f"{name} is not as long as its header says")
    return found


def read_npz(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz file; others are not read.

    Raises:
      DataError: the file cannot be read, or arrays are missing or do not fit in memory.
    """
    headers = npz_headers(path)
    for name in names:
        if name not in headers:
            raise errors.DataError(f"{path}: has no array {name}")
    limits.check(path, sum(headers[name].num_bytes for name in names))
    result = {}
    with reading(path), zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as file:
                result[name] = np.lib.format.read_array(file, allow_pickle=False)
    return result
