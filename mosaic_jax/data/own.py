"""A user's own data set: a folder of image files, or arrays in an npz file."""

import logging
import pathlib

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.data import dataset, formats, images, limits
from mosaic_jax.data.dataset import Arrays, Size, nearest_size, resize
from mosaic_jax.data.formats import Header

_log = logging.getLogger(__name__)

# Fraction of the images that is held out for testing where there is no test set.
TEST_SHARE = 0.2


def folder(directory: pathlib.Path, *, size: Size | None = None) -> Arrays:
    """Read a folder with one sub-folder of images per class.

    The sub-folders may also lie in two folders, `train` and `test`; otherwise a fifth
    of each class is held out for testing. Images are grey only if all of them are.
    Classes are numbered in the order of their names, over training and test sets.

    Args:
      directory: the folder.
      size: height and width that images are resized to; None: squares of 16, 32 or 64
        pixels, whichever is nearest to the median of their longer sides.

    Raises:
      DataError: it is not such a folder, or a file in it is not an image.
    """
    if not directory.is_dir():
        raise errors.DataError(f"data.dir = {directory}: must be a folder of images")
    parts = [directory / part for part in ("train", "test")]
    split = all(part.is_dir() for part in parts)
    roots = parts if split else [directory]
    classes = sorted({path.name for root in roots for path in _folders(root)})
    files = [
        (path, "train" if root is roots[0] else "test", number)
        for root in roots
        for number, name in enumerate(classes)
        for path in sorted((root / name).glob("**/*"))
        if path.suffix.lower() in images.FILES and _regular(path)
    ]
    if len(classes) < 2 or not files:
        raise errors.DataError(
            f"data.dir = {directory}: must have a sub-folder of images for each of at"
            " least two classes"
        )
    sides, grey = zip(*(images.look_at(path) for path, _, _ in files), strict=True)
    size = size or nearest_size(float(np.median(sides)))
    mode = "L" if all(grey) else "RGB"
    contents = ((str(path), limits.read(path)) for path, _, _ in files)
    image = np.stack(list(images.decode_all(contents, size, mode)))
    label = np.array([number for _, _, number in files])
    test = np.array([part == "test" for _, part, _ in files])
    if not split:
        test = _held_out(label)
    return Arrays(image[~test], label[~test], image[test], label[test])


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    """Sub-folders, without the hidden ones, which other programs create."""
    return [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _regular(path: pathlib.Path) -> bool:
    """Whether `path` is a regular file; reading a pipe or device might never end."""
    if path.is_file():
        return True
    _log.warning("%s: no regular file: left out", path)
    return False


def npz(path: pathlib.Path, *, size: Size | None = None, column: str = "") -> Arrays:
    """Read an npz file of uint8 images [N, H, W] or [N, H, W, D], integer labels [N].

    The arrays are called x_train and y_train, and x_test and y_test if there is a test
    set; others are not read.

    Args:
      path: of the file.
      size: height and width that images are resized to; None: squares of 16, 32 or 64
        pixels, whichever is nearest.
      column: name of an array [N] with the group of each training image; "": none.

    Raises:
      DataError: there is no such file, or an array is missing or of another type.
    """
    if not path.is_file():
        raise errors.DataError(f"data.dir = {path}: must be an npz file")
    headers = formats.npz_headers(path)
    if ("x_test" in headers) != ("y_test" in headers):
        raise errors.DataError(f"{path}: must have both x_test and y_test or neither")
    parts = ("train", "test") if "x_test" in headers else ("train",)
    for part in parts:
        for name in (f"x_{part}", f"y_{part}"):
            if name not in headers:
                raise errors.DataError(f"{path}: has no array {name}")
        _check(path, headers[f"x_{part}"], headers[f"y_{part}"])
    wanted = headers["x_train"].shape[:1]
    if column in headers and headers[column].shape != wanted:
        raise errors.DataError(
            f"data.column = {column!r}: of shape {headers[column].shape} in {path}:"
            f" must be {list(wanted)}, one for each training image"
        )
    names = [f"{kind}_{part}" for part in parts for kind in "xy"]
    found = formats.read_npz(path, [*names, *([column] if column else [])])
    arrays = []
    for name in names:
        array = found[name]
        if name.startswith("y"):
            arrays.append(array.reshape(-1))
        else:
            image = array[..., None] if array.ndim == 3 else array
            arrays.append(resize(image, size or nearest_size(image.shape[1])))
    group = found[column] if column else None
    if len(parts) == 1:
        return with_test_set(*arrays, group=group)
    return Arrays(*arrays, train_group=group)


def with_test_set(
    image: np.ndarray, label: np.ndarray, group: np.ndarray | None = None
) -> Arrays:
    """A data set whose test set is a fixed fifth of each class.

    Args:
      image: [N, H, W, D].
      label: [N], classes.
      group: [N]; None: there are no groups.

    Raises:
      DataError: there are not as many groups as images.
    """
    dataset.check_groups(group, len(image))
    test = _held_out(label)
    kept = None if group is None else group[~test]
    return Arrays(image[~test], label[~test], image[test], label[test], kept)


def _check(path: pathlib.Path, image: Header, label: Header) -> None:
    channels = image.shape[3:] or (1,)
    if (
        image.dtype != np.uint8
        or len(image.shape) not in (3, 4)
        or channels[0] not in (1, 3)
        or not image.num_bytes
    ):
        raise errors.DataError(
            f"{path}: images of shape {image.shape} and type {image.dtype}: must be"
            " uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], and not empty"
        )
    num = image.shape[0]
    if label.dtype.kind not in "iu" or label.shape not in ((num,), (num, 1)):
        raise errors.DataError(
            f"{path}: labels of shape {label.shape} and type {label.dtype}: must be"
            f" integers [{num}]"
        )


def _held_out(label: np.ndarray) -> np.ndarray:
    """A fixed fraction of each class, for testing, [N] bool."""
    np_rng, result = np.random.RandomState(0), np.zeros(len(label), bool)
    for k in np.unique(label):
        members = np_rng.permutation(np.flatnonzero(label == k))
        result[members[: round(TEST_SHARE * len(members))]] = True
    return result
