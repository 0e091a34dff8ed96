"""Archives of data sets: found, downloaded and verified; never unpacked to disk."""

import contextlib
import dataclasses
import hashlib
import pathlib
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from mosaic_jax.core import errors
from mosaic_jax.data import limits

CONNECT_SECONDS = 6.0
_BLOCK = 1 << 20


@contextlib.contextmanager
def reading(path: pathlib.Path | str) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into one kind of error.

    Raises:
      DataError: the body raised an exception; the message names `path`.
    """
    try:
        yield
    except errors.MosaicError:
        raise
    except Exception as error:
        reason = errors.reason(error)
        raise errors.DataError(f"{path}: cannot be read: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file of a data set and where to download it.

    Attributes:
      name: of the file.
      url: of the folder that contains it, with a final slash.
      sha256: hex digest of the file, or of the result of `decode`.
      decode: decompresses a file whose compression differs between sources; None: the
        file is used as it is.
    """

    name: str
    url: str
    sha256: str
    decode: Callable[[pathlib.Path], bytes] | None = None

    def find(self, folders: Sequence[pathlib.Path]) -> pathlib.Path:
        """The file's path in the first of `folders` that has it.

        A file that no folder has is downloaded to the first one.

        Raises:
          DataError: it cannot be downloaded; the message says where to put the file.
        """
        for folder in folders:
            if (folder / self.name).is_file():
                return folder / self.name
        path = folders[0] / self.name
        download(self, path)
        return path

    def content(self, path: pathlib.Path) -> bytes:
        """Decoded and verified content of the file at `path`.

        Raises:
          DataError: it cannot be read, or its sha256 does not match.
        """
        with reading(path):
            content = self.decode(path) if self.decode else limits.read(path)
        _compare(hashlib.sha256(content).hexdigest(), self.sha256, path)
        return content

    def verify(self, path: pathlib.Path) -> None:
        """Check the sha256 of the file at `path`; a big one is not read into memory.

        Raises:
          DataError: it does not match.
        """
        if self.decode:
            self.content(path)
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _compare(digest, self.sha256, path)


def _compare(found: str, expected: str, path: pathlib.Path) -> None:
    if found != expected:
        raise errors.DataError(f"{path}: wrong sha256: delete the file and try again")


def download(archive: Archive, path: pathlib.Path) -> None:
    """Download an archive to `path`, with a progress bar.

    An interrupted download is resumed by the next call.

    Raises:
      DataError: it cannot be downloaded, or its sha256 is wrong; in the latter case the
        file is deleted.
    """
    partial, url = path.with_name(path.name + ".partial"), archive.url + archive.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = partial.stat().st_size if partial.is_file() else 0
        with contextlib.closing(_connect(url, done)) as response:
            # A server that does not know ranges starts anew.
            if getattr(response, "status", None) != 206:
                done = 0
            size = int(response.headers.get("Content-Length", 0)) + done or None
            bar = tqdm.tqdm(
                total=size,
                initial=done,
                desc=path.name,
                unit="B",
                unit_scale=True,
                disable=None,
            )
            with bar, partial.open("ab" if done else "wb") as file:
                while block := response.read(_BLOCK):
                    bar.update(file.write(block))
        if size and partial.stat().st_size < size:
            raise OSError(f"ended after {partial.stat().st_size} of {size} bytes")
    except OSError as error:
        raise errors.DataError(
            f"{path} is missing and {url} cannot be fetched ({errors.reason(error)}):"
            f" put the file {path.name} into {path.parent.resolve()}"
        ) from error
    try:
        archive.verify(partial)
    except errors.DataError:
        partial.unlink()
        raise
    partial.replace(path)


def _connect(url: str, done: int) -> Any:
    """Response to a request for `url` from byte `done` on.

    A thread keeps the time limit: urlopen's own does not cover the look-up of names.
    """
    answer: list[Any] = []
    request = urllib.request.Request(url)
    if done:
        request.add_header("Range", f"bytes={done}-")

    def open_url() -> None:
        try:
            answer.append(urllib.request.urlopen(request, timeout=CONNECT_SECONDS))
        except urllib.error.HTTPError as error:
            # 416: all bytes are here already, or the file has changed: start anew.
            answer.append(_connect(url, 0) if error.code == 416 else error)
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=open_url, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    result = answer[0] if answer else TimeoutError("no answer")
    if isinstance(result, OSError):
        raise result
    return result


def members(
    path: pathlib.Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar or zip archive that `wanted(name)`.

    They come in the archive's order. Names are only compared, never used as paths.

    Raises:
      DataError: the archive cannot be read, or a file does not fit in memory.
    """
    with reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and wanted(entry.filename):
                        limits.check(f"{path}: {entry.filename}", entry.file_size)
                        yield entry.filename, archive.read(entry)
            return
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    limits.check(f"{path}: {member.name}", member.size)
                    file = archive.extractfile(member)
                    assert file is not None  # None is for folders and devices alone
                    yield member.name, file.read()


def read_members(path: pathlib.Path, names: Sequence[str]) -> list[bytes]:
    """Contents of the files `names` of an archive, in the order of `names`.

    Raises:
      DataError: one is missing, or the archive cannot be read.
    """
    found = dict(members(path, lambda name: name in names))
    for name in names:
        if name not in found:
            raise errors.DataError(f"{path}: cannot be read: has no {name}")
    return [found[name] for name in names]
