"""Data sets by name, from a cache, their files, TFDS or a download."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mosaic_jax.core import errors, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.data import formats, hub, own, prepared, readers
from mosaic_jax.data.dataset import Arrays, Info, Size, describe, resized

# Readers of whatever a library of data sets has, by what precedes its name.
_LIBRARIES = {"tfds": prepared.read_any, "hf": hub.read_any}
# What a cache holds.
_FIELDS = ("train_image", "train_label", "test_image", "test_label")
_CIFAR100_MOMENTS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_GREY = (0.1307,), (0.3081,)


@dataclasses.dataclass(frozen=True)
class Source:
    """How a data set is read.

    Attributes:
      info: its properties; None: they are measured on the data.
      read: `read(directory)` returns the data or raises DataError.
      tfds: its name in TensorFlow Datasets, "" if it is not there.
      num_images: of its training and its test set; (0, 0) where it takes no time to
        read, or where nothing is known before it is read.
      needs_files: whether a set without `info` needs its `directory` to exist.
      options: of "size", "column" and "in_memory", what `read` takes beside, by name.
    """

    info: Info | None
    read: Callable[..., Arrays]
    tfds: str = ""
    num_images: tuple[int, int] = (0, 0)
    needs_files: bool = True
    options: tuple[str, ...] = ()


def _is_source(found: Any) -> bool:
    is_function = callable(found) and not isinstance(found, type)
    return is_function or isinstance(found, Source)


SOURCES: Registry[Source] = Registry(
    "data.name",
    {
        "digits": Source(Info(10, 16, 1, (0.3053,), (0.3334,), "none"), readers.digits),
        "mnist": Source(
            Info(10, 32, 1, *_GREY, "none"), readers.mnist, "mnist", (60_000, 10_000)
        ),
        "fashion_mnist": Source(
            Info(10, 32, 1, *_GREY, "none"),
            readers.fashion_mnist,
            "fashion_mnist",
            (60_000, 10_000),
        ),
        "svhn": Source(
            Info(10, 32, 3, (0.5,) * 3, (0.5,) * 3, "crop_flip"),
            readers.svhn,
            "svhn_cropped",
            (73_257, 26_032),
        ),
        "cifar10": Source(
            Info(
                10,
                32,
                3,
                (0.4914, 0.4822, 0.4465),
                (0.2023, 0.1994, 0.2010),
                "crop_flip",
            ),
            readers.cifar10,
            "cifar10",
            (50_000, 10_000),
        ),
        "cifar100": Source(
            Info(100, 32, 3, *_CIFAR100_MOMENTS, "crop_flip"),
            readers.cifar100,
            "cifar100",
            (50_000, 10_000),
        ),
        "tiny_imagenet": Source(
            Info(200, 32, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop_flip"),
            readers.tiny_imagenet,
            num_images=(100_000, 10_000),
        ),
        "food101": Source(
            Info(101, 32, 3, *_CIFAR100_MOMENTS, "none"),
            readers.food101,
            "food101",
            (75_750, 25_250),
        ),
        "folder": Source(None, own.folder, options=("size",)),
        "npz": Source(None, own.npz, options=("size", "column")),
    },
    schema.Allowed(
        "a function from a path to mosaic_jax.data.dataset.Arrays", _is_source
    ),
)


def load(
    name: str,
    directory: str | pathlib.Path,
    *,
    size: Size | None = None,
    column: str = "",
    in_memory: bool = True,
) -> tuple[Info, Arrays]:
    """The data set called `name`.

    It comes from the first of these that there is: the cache in `directory`, a set that
    TFDS prepared there, the set's files there, a download. For "folder", `directory` is
    the user's folder, for "npz" the file; neither is cached. A `name` such as
    "package.module:function" is a user's function from a path to `Arrays`, one such as
    "tfds:NAME" any set of images with classes that TFDS prepared, and "hf:NAME" one of
    the library `datasets`.

    Args:
      name: of the data set.
      directory: see above.
      size: height and width of the images; None: those of the set, or, where they may
        be any, squares of 16, 32 or 64 pixels that fit best.
      column: of the set's table, with the group of each training image; "": none.
      in_memory: False, of "tfds:NAME" alone: training images are `StoredImages`.

    Raises:
      ConfigError: there is no such data set.
      DataError: files are damaged, or missing and cannot be downloaded; the message
        says which file to put where. Or there is no such column, or a user's function
        returns something else.
    """
    source, directory = _find(name), pathlib.Path(directory).expanduser()
    if not isinstance(source, Source):
        source = Source(None, _of_user(name, source), needs_files=False)
    if column and "column" not in source.options:
        raise errors.DataError(
            f"data.column = {column!r}: must be '' for data.name = {name!r}, which has"
            " no columns to choose from"
        )
    if source.info is None:
        if source.needs_files and not directory.exists():
            raise errors.DataError(f"data.dir = {directory}: no such file or folder")
        given = {"size": size, "column": column, "in_memory": in_memory}
        arrays = source.read(directory, **{key: given[key] for key in source.options})
        arrays = resized(arrays, size) if size else arrays
        info = describe(arrays)
        check(name, info, arrays)
        return info, arrays
    info, arrays = _known(name, source, source.info, directory)
    return (info.of_size(size), resized(arrays, size)) if size else (info, arrays)


def _known(
    name: str, source: Source, info: Info, directory: pathlib.Path
) -> tuple[Info, Arrays]:
    """A data set of this library, from its cache if there is one."""
    cache = _cache(name, info, directory)
    # A damaged cache may raise anything; it is then written again.
    with contextlib.suppress(Exception):
        arrays = Arrays(**formats.read_npz(cache, _FIELDS))
        check(name, info, arrays)
        return info, arrays
    folder = prepared.find(directory, source.tfds) if source.tfds else None
    arrays = prepared.read(folder, info) if folder else source.read(directory)
    check(name, info, arrays)
    _write_cache(cache, arrays)
    return info, arrays


def is_at_hand(name: str, directory: str | pathlib.Path) -> bool:
    """Whether `load` reads or makes the data set `name` without unpacking files first.

    Raises:
      ConfigError: there is no such data set.
    """
    source, directory = _find(name), pathlib.Path(directory).expanduser()
    if not isinstance(source, Source) or not any(source.num_images):
        return True
    assert source.info is not None  # the number of images is known
    cached = _cache(name, source.info, directory).exists()
    return cached or bool(source.tfds and prepared.find(directory, source.tfds))


def check(name: str, info: Info, arrays: Arrays) -> None:
    """Check that images and labels have the shapes and ranges that `info` promises.

    Args:
      name: of the data set, for messages.
      info: its properties.
      arrays: its images and labels.

    Raises:
      DataError: `arrays` contradict `info`, or are empty.
    """
    for part in ("train", "test"):
        image = getattr(arrays, f"{part}_image")
        label = getattr(arrays, f"{part}_label")
        if not len(label):
            raise errors.DataError(f"{name}: no {part} images")
        if image.dtype != np.uint8:
            raise errors.DataError(
                f"{name}: {part} images of {image.dtype}: must be uint8"
            )
        if image.shape[1:] != info.image_shape or len(image) != len(label):
            raise errors.DataError(
                f"{name}: {part} images of shape {image.shape}: must be"
                f" {[len(label), *info.image_shape]}"
            )
        if label.min() < 0 or label.max() >= info.num_classes:
            raise errors.DataError(
                f"{name}: {part} labels {label.min()}..{label.max()}: must be"
                f" 0..{info.num_classes - 1}"
            )


def _find(name: str) -> Source | Callable[[pathlib.Path], Any]:
    """The source called `name`."""
    kind, _, rest = name.partition(":")
    if kind in _LIBRARIES and rest:
        read = functools.partial(_LIBRARIES[kind], name=rest)
        options = ("size", "column", *(["in_memory"] if kind == "tfds" else []))
        return Source(None, read, needs_files=False, options=options)
    return SOURCES.find(name)


def _of_user(
    name: str, function: Callable[[pathlib.Path], Any]
) -> Callable[[pathlib.Path], Arrays]:
    """A user's function, which may return or raise anything, as `Source.read`."""

    def read(directory: pathlib.Path) -> Arrays:
        try:
            found = function(directory)
        except OSError as error:
            raise errors.DataError(
                f"data.name = {name!r}, data.dir = {directory}: files must be readable:"
                f" {type(error).__name__}: {errors.reason(error)}"
            ) from error
        if not isinstance(found, Arrays):
            raise errors.DataError(
                f"data.name = {name!r}: must return mosaic_jax.data.dataset.Arrays, not"
                f" {type(found).__name__}"
            )
        return found

    return read


def _cache(name: str, info: Info, directory: pathlib.Path) -> pathlib.Path:
    """The file of a data set's arrays."""
    return directory / "cache" / f"{name}_{info.image_size}.npz"


def _write_cache(path: pathlib.Path, arrays: Arrays) -> None:
    # Where the folder is not writable, the set is prepared again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{field: getattr(arrays, field) for field in _FIELDS})
        partial.replace(path)
