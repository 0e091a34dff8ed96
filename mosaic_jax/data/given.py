"""Data sets of what a user has at hand, for `mosaic_jax.Study(data=...)`."""

import pathlib
from typing import Any

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.data import dataset, hub, own, prepared
from mosaic_jax.data.dataset import Arrays, Size


def arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    groups: Any = None,
    size: Size | None = None,
) -> Arrays:
    """A data set of arrays that are at hand.

    Images are uint8, or floats in [0, 1], [N, H, W] or [N, H, W, D] with D of 1 or 3.

    Args:
      x_train: training images.
      y_train: their classes [N], integers from 0.
      x_test: test images; None: a fixed fifth of each class of the training images.
      y_test: their classes.
      groups: [N] integers or text: whose each training image is, such as a writer, for
        `partition="by_column"`.
      size: height and width that images are resized to, for methods that generate none
        also of rectangles; None: squares of 16, 32 or 64 pixels, whichever is nearest.

    Raises:
      DataError: images or labels are of another type, range or shape.
    """
    _check_size(size)
    if (x_test is None) != (y_test is None):
        raise errors.DataError("x_test, y_test: must both be given or neither")
    image = dataset.from_user(x_train, "x_train", size)
    label = _labels(y_train, len(image), "y_train")
    group = None if groups is None else np.asarray(groups)
    if x_test is None:
        return own.with_test_set(image, label, group)
    test_image = dataset.from_user(x_test, "x_test", size)
    if test_image.shape[1:] != image.shape[1:]:
        raise errors.DataError(
            f"x_test: images {test_image.shape[1:]}: must be {image.shape[1:]} as those"
            " of x_train"
        )
    test_label = _labels(y_test, len(test_image), "y_test")
    return Arrays(image, label, test_image, test_label, group)


def folder(path: str | pathlib.Path, *, size: Size | None = None) -> Arrays:
    """A data set of image files, see `own.folder`: a sub-folder for each class.

    Args:
      path: of the folder.
      size: see `arrays`.

    Raises:
      DataError: it is not such a folder, or a file in it is not an image.
    """
    _check_size(size)
    return own.folder(pathlib.Path(path).expanduser(), size=size)


def npz(
    path: str | pathlib.Path, *, size: Size | None = None, column: str = ""
) -> Arrays:
    """A data set in an npz file, see `own.npz`: x_train, y_train, x_test and y_test.

    Args:
      path: of the file.
      size: see `arrays`.
      column: name of the array with the `groups`; "": there are none.

    Raises:
      DataError: there is no such file, or an array is missing or of another type.
    """
    _check_size(size)
    return own.npz(pathlib.Path(path).expanduser(), size=size, column=column)


def tfds(
    name: str,
    directory: str | pathlib.Path = "data",
    *,
    size: Size | None = None,
    column: str = "",
) -> Arrays:
    """A data set that TensorFlow Datasets prepared, see `prepared.read_any`.

    Args:
      name: of the data set, as of TFDS.
      directory: where it was prepared.
      size: see `arrays`.
      column: the feature with the `groups`, such as a writer's; "": there are none.

    Raises:
      DataError: it is not prepared, or no set of images with one class each.
    """
    _check_size(size)
    where = pathlib.Path(directory).expanduser()
    return prepared.read_any(where, name, size=size, column=column)


def hf(
    name: str,
    directory: str | pathlib.Path = "data",
    *,
    size: Size | None = None,
    column: str = "",
) -> Arrays:
    """A data set of Hugging Face's library `datasets`, see `hub.read_any`.

    Args:
      name: a folder in `directory` that `save_to_disk` wrote, or "OWNER/REPOSITORY".
      directory: where it is, or where tables of what is downloaded are kept.
      size: see `arrays`.
      column: with the `groups`; "": there are none.

    Raises:
      ConfigError: `datasets` is not installed.
      DataError: there is no such data set, or no images with one class each.
    """
    _check_size(size)
    where = pathlib.Path(directory).expanduser()
    return hub.read_any(where, name, size=size, column=column)


def _check_size(size: Any) -> None:
    """Check that images may be resized so.

    Raises:
      DataError: `size` is neither None nor a height and a width.
    """
    if size is not None and not dataset.is_size(size):
        raise errors.DataError(
            f"size = {size!r}: must be None, or a height and a width of"
            f" {dataset.LEAST_SIDE}..{dataset.MOST_SIDE} pixels"
        )


def _labels(label: Any, count: int, name: str) -> np.ndarray:
    """Classes [count]."""
    label = np.asarray(label)
    if label.shape not in ((count,), (count, 1)):
        raise errors.DataError(
            f"{name}: of shape {label.shape}: must be [{count}], one for each image"
        )
    return label.reshape(-1)
