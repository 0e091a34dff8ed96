"""Data sets that TensorFlow Datasets prepared, read without TensorFlow."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tqdm

from mosaic_jax.core import errors
from mosaic_jax.data.dataset import Arrays, Info, Size, fit, nearest_size


def find(directory: pathlib.Path, name: str) -> pathlib.Path | None:
    """Folder of the latest version of a data set that TFDS prepared, or None."""
    found = sorted((directory / name).glob("**/dataset_info.json"))
    return found[-1].parent if found else None


def read(folder: pathlib.Path, info: Info) -> Arrays:
    """Read a data set whose properties are known.

    TensorFlow is needed unless it was prepared in the format ArrayRecord.

    Raises:
      DataError: it is needed and not there.
    """
    train, test, _ = _raw(folder)
    return _fitted(train, test, info.size, info.channels)


def _fitted(train: Any, test: Any, size: Size, channels: int) -> Arrays:
    """Images and classes of both sets as arrays, [N, *size, channels] and [N]."""
    return Arrays(
        fit(train[0], size, channels),
        train[1],
        fit(test[0], size, channels),
        test[1],
    )


def read_any(
    directory: pathlib.Path, name: str, *, size: Size | None = None, column: str = ""
) -> Arrays:
    """Read any data set of images with one class each.

    Args:
      directory: where TFDS prepared it.
      name: of the data set, as of TFDS: NAME or NAME/CONFIG.
      size: height and width that images are resized to; None: squares of 16, 32 or 64
        pixels, whichever is nearest to the median of their sides.
      column: the feature with the group of each training image; "": none.

    Raises:
      DataError: it is not prepared, is not of that kind, or TensorFlow is needed and
        not there; the message says what to do.
    """
    folder = find(directory, name)
    if folder is None:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': not prepared in {directory.resolve()}: must"
            ' be, where TensorFlow is installed, by python -c "import'
            f" tensorflow_datasets as t; t.builder({name!r}, data_dir='{directory}',"
            " file_format='array_record').download_and_prepare()\""
        )
    train, test, group = _raw(folder, column)
    images = [*train[0], *test[0]]
    if not train[0] or not test[0] or {image.ndim for image in images} != {3}:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': must have images for training and for testing"
        )
    depths = {image.shape[-1] for image in images}
    if not depths <= {1, 3}:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': images of {max(depths)} channels: must be of 1"
            " or 3"
        )
    sides = [(image.shape[0] * image.shape[1]) ** 0.5 for image in images]
    size = size or nearest_size(float(np.median(sides)))
    arrays = _fitted(train, test, size, max(depths))
    return dataclasses.replace(arrays, train_group=group)


def _raw(folder: pathlib.Path, column: str = "") -> tuple[Any, Any, np.ndarray | None]:
    """Images [H, W, D], of any size, and classes [N] for training and for testing.

    The last is the `column` of the training images, [N]; None if that is "".
    """
    import tensorflow_datasets as tfds

    # Declared loosely in the library itself.
    builder: Any = tfds.builder_from_directory(str(folder))
    file_format = builder.info.file_format.value
    keys = builder.info.supervised_keys or ("image", "label")
    wanted = (*keys, *([column] if column else []))
    splits = ("train", "test" if "test" in builder.info.splits else "validation")
    missing = [
        *(f"the feature {key!r}" for key in wanted if key not in builder.info.features),
        *(f"the split {name!r}" for name in splits if name not in builder.info.splits),
    ]
    if missing or len(keys) != 2:
        raise errors.DataError(
            f"{folder}: must be a set of images with one class each:"
            f" {', '.join(missing) or keys}: not there"
        )

    def rows(split: str) -> Iterable[Any]:
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

    def of_split(split: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        image, label, group = [], [], []
        for row in tqdm.tqdm(rows(split), split, disable=None):
            image.append(np.asarray(row[keys[0]]))
            label.append(int(row[keys[1]]))
            if column:
                group.append(_text(row[column]))
        return image, np.array(label), np.array(group)

    train, test = map(of_split, splits)
    return train[:2], test[:2], train[2] if column else None


def _text(value: Any) -> Any:
    """Text as such: TFDS has it as bytes."""
    return value.decode() if isinstance(value, bytes) else value
