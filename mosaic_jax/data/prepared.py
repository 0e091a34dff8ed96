"""Data sets that TensorFlow Datasets prepared, read without TensorFlow."""

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tqdm

from mosaic_jax.core import errors
from mosaic_jax.data.dataset import Arrays, Info, fit, nearest_size


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
    train, test = _raw(folder)
    return Arrays(fit(train[0], info), train[1], fit(test[0], info), test[1])


def read_any(directory: pathlib.Path, name: str) -> Arrays:
    """Read any data set of images with one class each; resized to what fits best.

    Args:
      directory: where TFDS prepared it.
      name: of the data set, as of TFDS: NAME or NAME/CONFIG.

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
    train, test = _raw(folder)
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
    size, depth = nearest_size(float(np.median(sides))), max(depths)
    info = Info(1, size, depth, (0.0,) * depth, (1.0,) * depth, "none")
    return Arrays(fit(train[0], info), train[1], fit(test[0], info), test[1])


def _raw(folder: pathlib.Path) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Images [H, W, D], of any size, and classes [N] for training and for testing."""
    import tensorflow_datasets as tfds

    # Declared loosely in the library itself.
    builder: Any = tfds.builder_from_directory(str(folder))
    file_format = builder.info.file_format.value
    keys = builder.info.supervised_keys or ("image", "label")
    splits = ("train", "test" if "test" in builder.info.splits else "validation")
    missing = [
        *(f"the feature {key!r}" for key in keys if key not in builder.info.features),
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

    def of_split(split: str) -> tuple[list[np.ndarray], np.ndarray]:
        image, label = [], []
        for row in tqdm.tqdm(rows(split), split, disable=None):
            image.append(np.asarray(row[keys[0]]))
            label.append(int(row[keys[1]]))
        return image, np.array(label)

    return [of_split(split) for split in splits]
