"""A data set as arrays, and the properties of it that networks depend on."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from mosaic_jax.core import errors

_log = logging.getLogger(__name__)

# Height and width in pixels.
Size = tuple[int, int]
# Sides of the squares that images of other sizes become unless a study says otherwise:
# those that generators draw.
SIDES = (16, 32, 64)
# Of images that a study may ask for.
LEAST_SIDE, MOST_SIDE = 4, 1024
# A confusion matrix has this number squared of entries.
MOST_CLASSES = 10_000
# Limits of how many images, and how many numbers in them, are converted at once.
_CHUNK, _CHUNK_NUMBERS = 10_000, 1 << 23


@dataclasses.dataclass(frozen=True)
class Info:
    """Properties of a data set that classifiers and generators depend on.

    Attributes:
      num_classes: K.
      image_size: height in pixels.
      channels: D, 1 for grey and 3 for RGB.
      mean: of the images, per channel, where black is 0 and white is 1.
      std: standard deviation, likewise.
      augmentation: of training images, a name of `augment.AUGMENTATIONS`.
      image_width: in pixels; 0: as the height.
    """

    num_classes: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    image_width: int = 0

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return (self.image_size, self.image_width or self.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels (H, W, D)."""
        return (*self.size, self.channels)

    @property
    def is_usual(self) -> bool:
        """Whether images are squares that all networks of this library take."""
        height, width = self.size
        return height == width and height in SIDES

    def of_size(self, size: Size) -> "Info":
        """The same of images of another height and width."""
        height, width = size
        width = 0 if width == height else width
        return dataclasses.replace(self, image_size=height, image_width=width)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images uint8 [N, H, W, D] and labels int32 [N] for training and for testing.

    Labels may be given in any integer type.

    Attributes:
      train_group: [N] integers or text: whose each training image is, such as a writer
        or a hospital, for `data.split = "by_column"`; None: it is not known.

    Raises:
      DataError: images are of another type or shape, there are none, or not as many as
        labels or groups; labels are not integers in [0, MOST_CLASSES).
    """

    train_image: Any  # np.ndarray, or `StoredImages`
    train_label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray
    train_group: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check all, then convert labels: the only place where that is done."""
        for part in ("train", "test"):
            image = getattr(self, f"{part}_image")
            shape, count = np.shape(image), len(getattr(self, f"{part}_label"))
            if getattr(image, "dtype", None) != np.uint8 or len(shape) != 4:
                raise errors.DataError(
                    f"{part} images of type {getattr(image, 'dtype', type(image))},"
                    f" shape {shape}: must be uint8 [N, H, W, D]"
                )
            if len(image) != count or not count:
                raise errors.DataError(
                    f"{len(image)} {part} images, {count} labels: must be as many, and"
                    " at least one"
                )
            name = f"{part}_label"
            label = np.asarray(getattr(self, name))
            kind = label.dtype.kind
            span = f", {label.min()}..{label.max()}" if kind in "iuf" else ""
            if kind not in "iu" or label.min() < 0 or label.max() >= MOST_CLASSES:
                raise errors.DataError(
                    f"{part} labels of type {label.dtype}{span}: must be integers"
                    f" 0..{MOST_CLASSES - 1}"
                )
            object.__setattr__(self, name, label.astype(np.int32))
        check_groups(self.train_group, len(self.train_label))


def check_groups(group: np.ndarray | None, count: int) -> None:
    """Check that each of `count` training images has a group, if there are groups.

    Raises:
      DataError: it has not, or groups are neither integers nor text.
    """
    if group is None:
        return
    found = np.asarray(group)
    if found.shape != (count,) or found.dtype.kind not in "iuSU":
        raise errors.DataError(
            f"groups of {found.dtype}, shape {found.shape}: must be integers or text"
            f" [{count}], one for each training image"
        )


def describe(arrays: Arrays) -> Info:
    """The `Info` of a user's own data, measured on it; without augmentation.

    Raises:
      DataError: more than half of the classes, counted up to the highest label, have no
        training image.
    """
    label = np.concatenate([arrays.train_label, arrays.test_label])
    num_classes = int(label.max()) + 1
    found = len(np.unique(arrays.train_label))
    if 2 * found < num_classes:
        raise errors.DataError(
            f"labels up to {num_classes - 1}, but training images of {found} classes:"
            f" must be numbered 0..{found - 1}"
        )
    mean, std = _moments(arrays.train_image)
    height, width, channels = arrays.train_image.shape[1:]
    found = Info(
        num_classes=num_classes,
        image_size=height,
        channels=channels,
        mean=tuple(round(float(x), 4) for x in mean),
        # One colour throughout would divide by zero.
        std=tuple(max(round(float(x), 4), 1e-3) for x in std),
        augmentation="none",
    )
    return found.of_size((height, width))


def _moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of uint8 images [N, H, W, D], where white is 1.

    Computed from histograms: exact, and without a copy of the images as floats.
    """
    count = np.zeros((image.shape[-1], 256), np.int64)
    for chunk in _chunks(image):
        for d in range(len(count)):
            count[d] += np.bincount(chunk[..., d].ravel(), minlength=256)
    byte, total = np.arange(256), count.sum(1)
    mean = count @ byte / total
    variance = (count * (byte - mean[:, None]) ** 2).sum(1) / total
    return mean / 255, np.sqrt(variance) / 255


def _chunks(image: np.ndarray) -> Iterator[np.ndarray]:
    """Split images into parts whose copies as floats are small."""
    at_once = min(_CHUNK, max(1, _CHUNK_NUMBERS // max(1, image[:1].size)))
    for start in range(0, len(image), at_once):
        yield image[start : start + at_once]


def absent(train_count: np.ndarray, test_count: np.ndarray) -> list[str]:
    """Messages about classes that lack training images, or test images alone.

    Args:
      train_count: [K] int, training images of each class.
      test_count: [K] int, test images of each class.
    """
    messages = []
    if len(missing := np.flatnonzero(train_count == 0)):
        messages.append(
            f"no training image of {_classes(missing, len(train_count))};"
            f" {test_count[missing].sum()} of {test_count.sum()} test images are of"
            " them"
        )
    if len(untested := np.flatnonzero((test_count == 0) & (train_count > 0))):
        messages.append(
            f"no test image of {_classes(untested, len(train_count))}: accuracy says"
            " nothing about them"
        )
    return messages


def pointless(train_count: np.ndarray, test_count: np.ndarray) -> str:
    """Why no study of these images could find anything; "": it could.

    Args:
      train_count: [K] int, training images of each class.
      test_count: [K] int, test images of each class.
    """
    held = np.flatnonzero(train_count)
    if len(held) == 1:
        only = held[0]
        return (
            f"all training images are of class {only}: there is nothing to tell apart"
        )
    if not test_count[held].any():
        return "no test image is of a class that any client holds"
    return ""


def _classes(which: np.ndarray, num_classes: int) -> str:
    names = ", ".join(map(str, which[:10])) + (", ..." if len(which) > 10 else "")
    return f"{len(which)} of {num_classes} classes ({names})"


def is_size(found: Any) -> bool:
    """Whether `found` is a height and a width that images may have."""
    return (
        isinstance(found, tuple | list)
        and len(found) == 2
        and all(type(one) is int and LEAST_SIDE <= one <= MOST_SIDE for one in found)
    )


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Bilinear resize of uint8 [N, H, W, D] to [N, *size, D]."""
    if image.shape[1:3] == tuple(size):
        return image
    result = np.empty((len(image), *size, image.shape[-1]), np.uint8)
    done = 0
    for chunk in _chunks(image):
        shape = (len(chunk), *result.shape[1:])
        floats = jax.image.resize(chunk.astype(np.float32), shape, "bilinear")
        result[done : done + len(chunk)] = np.asarray(floats).round().clip(0, 255)
        done += len(chunk)
    return result


def resized(arrays: Arrays, size: Size) -> Arrays:
    """All images of a data set, of another height and width."""
    return dataclasses.replace(
        arrays,
        train_image=resize(arrays.train_image, size),
        test_image=resize(arrays.test_image, size),
    )


def fit(images: Sequence[np.ndarray], size: Size, channels: int) -> np.ndarray:
    """Images uint8 [H, W, D] of any sizes as one array [N, *size, channels].

    Grey images are repeated over the channels.

    Args:
      images: of any sizes.
      size: height and width of the result.
      channels: D of the result.

    Raises:
      DataError: there are no images, or they are not uint8.
    """
    if {image.dtype for image in images} != {np.dtype(np.uint8)}:
        found = ", ".join(sorted({str(image.dtype) for image in images})) or "none"
        raise errors.DataError(f"images of type {found}: must be uint8")
    if len({image.shape for image in images}) == 1:
        result = resize(np.stack(images), size)
        shape = (len(result), *size, channels)
        return np.ascontiguousarray(np.broadcast_to(result, shape))
    return fit_each(images, size, channels)


def fit_each(images: Sequence[np.ndarray], size: Size, channels: int) -> np.ndarray:
    """Images uint8 [H, W, D] as one array, each resized by itself.

    Args:
      images: of any sizes.
      size: height and width of the result.
      channels: D of the result.
    """
    height, width = size
    result = np.empty((len(images), height, width, channels), np.uint8)
    for row, image in zip(result, images, strict=True):
        pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        pillow = pillow.resize((width, height), Image.Resampling.BILINEAR)
        row[:] = np.asarray(pillow).reshape(height, width, -1)
    return result


def from_user(images: Any, name: str, size: Size | None = None) -> np.ndarray:
    """A user's images as the library's: uint8 [N, *size, D].

    Args:
      images: uint8, or floats in [0, 1]; [N, H, W] or [N, H, W, D] with D of 1 or 3.
      name: of the images, for messages.
      size: height and width; None: the square of `nearest_size`.

    Raises:
      DataError: they are of another type, range or shape, or there are none.
    """
    image = np.asarray(images)
    image = image[..., None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[-1] not in (1, 3) or not image.size:
        raise errors.DataError(
            f"{name}: images of shape {np.shape(images)}: must be [N, H, W],"
            " [N, H, W, 1] or [N, H, W, 3], and not empty"
        )
    if image.dtype != np.uint8:
        low, high = image.min(), image.max()
        # A comparison with NaN is False.
        if image.dtype.kind != "f" or not (low >= 0 and high <= 1):
            raise errors.DataError(
                f"{name}: images of {image.dtype}, {low}..{high}: must be uint8, or"
                " floats in [0, 1]"
            )
        image = (image * 255).round().astype(np.uint8)
    height, width = image.shape[1:3]
    size = size or nearest_size((height * width) ** 0.5)
    if (height, width) != tuple(size):
        _log.info(
            "%s: %d x %d pixels are resized to %d x %d", name, height, width, *size
        )
    return resize(image, size)


def nearest_size(side: float) -> Size:
    """The square, of one of `SIDES`, for images of about `side` pixels."""
    found = next((one for one in SIDES if side <= 1.5 * one), SIDES[-1])
    return (found, found)
