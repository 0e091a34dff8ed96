"""Files below a URL of an object store, by fsspec; each error is one line."""

import contextlib
import importlib
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from mosaic_jax.core import errors

INSTALL = 'pip install "mosaic_jax[object-stores]"'


class ObjectStore:
    """The objects below a URL; names are relative to it, as a/b.

    All methods raise StoreError where the store cannot be reached, or refuses.
    """

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        """Nothing is asked of the store yet.

        Args:
          filesystem: of fsspec.
          root: path in it, without a slash at its end.
          url: of both, for messages.
        """
        self._filesystem, self._root, self.url = filesystem, root, url

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every object, by name.

        Raises:
          StoreError: a name leads out of any folder that it would be copied to.
        """
        with self._told():
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._root, detail=True)
        start = len(self._root) + 1
        sizes = {
            path[start:]: int(info["size"])
            for path, info in found.items()
            if path.startswith(f"{self._root}/") and not path.endswith("/")
        }
        for name in sizes:
            path = pathlib.PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise errors.StoreError(f"{self.url}: {name!r} is no name of a file")
        return sizes

    def get(self, names: Collection[str], folder: pathlib.Path) -> None:
        """Copy objects into a folder, under their names."""
        paths = [folder / name for name in names]
        for parent in {folder, *(path.parent for path in paths)}:
            parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._filesystem.get([*map(self._path, names)], [*map(str, paths)])

    def put(self, names: Collection[str], folder: pathlib.Path) -> None:
        """Copy files of a folder to the store, under their names."""
        paths = [str(folder / name) for name in names]
        with self._told():
            self._filesystem.put(paths, [*map(self._path, names)])

    def remove(self, names: Collection[str]) -> None:
        """Remove objects; those that are not there any more are no error."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm([*map(self._path, names)])

    def read(self, name: str) -> bytes | None:
        """Content of an object; None: there is none."""
        with self._told():
            try:
                return self._filesystem.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        with self._told():
            self._filesystem.pipe_file(self._path(name), content)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store's client raises kinds of its own
            told = f"{type(error).__name__}: {errors.reason(error)}"
            raise errors.StoreError(f"{self.url}: {told}") from error


def connect(told: str, url: str) -> ObjectStore:
    """The store that a URL such as gs://BUCKET/RUN names; it is not asked for anything.

    Credentials, endpoints and the like are those of fsspec and of the package for the
    scheme: their files and environment variables.

    Args:
      told: how messages begin, such as "--workdir = URL".
      url: of the run directory.

    Raises:
      ConfigError: the scheme is unknown, or the package for it is not installed.
    """
    try:
        core = importlib.import_module("fsspec.core")
    except ImportError as error:
        raise errors.ConfigError(
            f"{told}: needs the package fsspec: {INSTALL}"
        ) from error
    # Of local files only: other file systems have no folders to make.
    options = {"auto_mkdir": True} if url.startswith(("file://", "local://")) else {}
    try:
        filesystem, root = core.url_to_fs(url, **options)
    except ImportError as error:
        package = _package(url)
        raise errors.ConfigError(
            f"{told}: needs the package {package}: pip install {package}"
        ) from error
    except Exception as error:  # of unknown schemes, and of clients that are set up
        raise errors.ConfigError(
            f"{told}: {errors.reason(error)}: must be a URL that fsspec knows, such as"
            " gs://BUCKET/RUN or s3://BUCKET/RUN"
        ) from error
    return ObjectStore(filesystem, root.rstrip("/"), url)


def _package(url: str) -> str:
    """The package that has the class of file systems for a URL."""
    registry = importlib.import_module("fsspec.registry")
    scheme = url.partition("://")[0].rpartition("::")[2]
    found = registry.known_implementations.get(scheme, {"class": scheme})
    return found["class"].partition(".")[0]
