"""Data sets by name: from the cache, their files, TFDS, or the network."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import tqdm

from mosaic_jax import errors
from mosaic_jax.data import formats, own, readers
from mosaic_jax.data.arrays import IMAGE_SIZES, Arrays, Info, describe, fit

_FIELDS = tuple(field.name for field in dataclasses.fields(Arrays))
_CIFAR100_MOMENTS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_GREY = (0.1307,) * 3, (0.3081,) * 3


@dataclasses.dataclass(frozen=True)
class Source:
    """How a data set is read.

    Attributes:
      info: None: as the data show.
      read: `read(directory)`; raises DataError.
      tfds: its name there, "" if it has none.
    """

    info: Info | None
    read: Callable[[pathlib.Path], Arrays]
    tfds: str = ""


SOURCES = {
    "digits": Source(Info(10, 16, 1, (0.3053,), (0.3334,), "none"), readers.digits),
    "mnist": Source(Info(10, 32, 3, *_GREY, "none"), readers.mnist, "mnist"),
    "fashion_mnist": Source(
        Info(10, 32, 3, *_GREY, "none"), readers.fashion_mnist, "fashion_mnist"
    ),
    "svhn": Source(
        Info(10, 32, 3, (0.5,) * 3, (0.5,) * 3, "crop_flip"),
        readers.svhn,
        "svhn_cropped",
    ),
    "cifar10": Source(
        Info(10, 32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "crop_flip"),
        readers.cifar10,
        "cifar10",
    ),
    "cifar100": Source(
        Info(100, 32, 3, *_CIFAR100_MOMENTS, "crop_flip"), readers.cifar100, "cifar100"
    ),
    "tiny_imagenet": Source(
        Info(200, 32, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop_flip"),
        readers.tiny_imagenet,
    ),
    "food101": Source(
        Info(101, 32, 3, *_CIFAR100_MOMENTS, "none"), readers.food101, "food101"
    ),
    "folder": Source(None, own.folder),
    "npz": Source(None, own.npz),
}


def load(name: str, directory: str | pathlib.Path) -> tuple[Info, Arrays]:
    """The data set called `name`, by the first that works of: the cache in
    `directory`, a set there that TFDS prepared, its files there, a download.

    For "folder" `directory` is the user's folder, for "npz" the file; neither is cached.

    Raises:
      DataError: no such data set; or the files are missing and cannot be downloaded
        (says which file to put where); or a file is damaged.
    """
    if name not in SOURCES:
        raise errors.DataError(
            f"data.name = {name!r}: must be one of {', '.join(SOURCES)}"
        )
    source, directory = SOURCES[name], pathlib.Path(directory).expanduser()
    if source.info is None:
        if not directory.exists():
            raise errors.DataError(f"data.dir = {directory}: no such file or folder")
        arrays = source.read(directory)
        info = describe(arrays)
        check(name, info, arrays)
        return info, arrays
    info = source.info
    cache = directory / "cache" / f"{name}_{info.image_size}.npz"
    # Of a damaged cache anything may be raised; it is made anew.
    with contextlib.suppress(Exception):
        arrays = Arrays(**formats.read_npz(cache, _FIELDS))
        check(name, info, arrays)
        return info, arrays
    prepared = _prepared(directory, source.tfds) if source.tfds else None
    arrays = _from_tfds(prepared, info) if prepared else source.read(directory)
    check(name, info, arrays)
    _write_cache(cache, arrays)
    return info, arrays


def check(name: str, info: Info, arrays: Arrays) -> None:
    """Check shapes and labels.

    Raises:
      DataError: they do not fit `info`.
    """
    if info.image_size not in IMAGE_SIZES:
        raise errors.DataError(
            f"{name}: images of {info.image_size} pixels: must be of"
            f" {', '.join(map(str, IMAGE_SIZES))}"
        )
    for part in ("train", "test"):
        image = getattr(arrays, f"{part}_image")
        label = getattr(arrays, f"{part}_label")
        if not len(label):
            raise errors.DataError(f"{name}: no {part} images")
        if image.dtype != np.uint8:
            raise errors.DataError(f"{name}: {part} images of {image.dtype}: must be uint8")
        if image.shape[1:] != info.image_shape or len(image) != len(label):
            raise errors.DataError(
                f"{name}: {part} images of shape {image.shape}: must be"
                f" [{len(label)}, {info.image_size}, {info.image_size}, {info.channels}]"
            )
        if label.min() < 0 or label.max() >= info.num_classes:
            raise errors.DataError(
                f"{name}: {part} labels {label.min()}..{label.max()}: must be"
                f" 0..{info.num_classes - 1}"
            )


def _write_cache(path: pathlib.Path, arrays: Arrays) -> None:
    # Without a writable data folder the set is simply prepared again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{field: getattr(arrays, field) for field in _FIELDS})
        partial.replace(path)


def _prepared(directory: pathlib.Path, name: str) -> pathlib.Path | None:
    """Where TFDS has the latest version of its data set `name` in `directory`."""
    found = sorted((directory / name).glob("**/dataset_info.json"))
    return found[-1].parent if found else None


def _from_tfds(folder: pathlib.Path, info: Info) -> Arrays:
    """Arrays of a set that TFDS prepared.

    As ArrayRecord it is read without TensorFlow, in other formats with it.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    file_format = builder.info.file_format.value

    def rows(split: str):
        if file_format == "array_record":
            return builder.as_data_source(split)
        try:
            return tfds.as_numpy(builder.as_dataset(split=split))
        except ImportError as error:
            raise errors.DataError(
                f"{folder}: prepared as {file_format}: must be array_record where"
                " TensorFlow is not installed (prepare it with"
                " file_format='array_record')"
            ) from error

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        image, label = [], []
        for row in tqdm.tqdm(rows(split), split, disable=None):
            image.append(np.asarray(row["image"]))
            label.append(int(row["label"]))
        return fit(image, info), np.array(label)

    splits = ["train", "test" if "test" in builder.info.splits else "validation"]
    return Arrays(*arrays(splits[0]), *arrays(splits[1]))
