"""A data set as arrays, and what networks must know of it."""

import dataclasses
import io
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

IMAGE_SIZES = (16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Info:
    """What a classifier and a generator must know of a data set.

    `mean` and `std` per channel where black is 0 and white is 1.
    """

    num_classes: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, D)."""
        return (self.image_size, self.image_size, self.channels)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images uint8 [N, H, W, D] and labels int32 [N], for training and for test."""

    train_image: np.ndarray
    train_label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray


def describe(arrays: Arrays) -> Info:
    """The `Info` of a user's own data: what it shows; no augmentation."""
    image = arrays.train_image
    label = np.concatenate([arrays.train_label, arrays.test_label])
    # Sums of bytes are exact, and need no copy of all images as floats.
    axes = (0, 1, 2)
    mean = image.mean(axes, dtype=np.float64) / 255
    std = image.std(axes, dtype=np.float64) / 255
    return Info(
        num_classes=int(label.max()) + 1,
        image_size=image.shape[1],
        channels=image.shape[3],
        mean=tuple(round(float(x), 4) for x in mean),
        # One colour throughout would divide by zero.
        std=tuple(max(round(float(x), 4), 1e-3) for x in std),
        augmentation="none",
    )


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of uint8 [N, H, W, D] to [N, size, size, D]."""
    if image.shape[1:3] == (size, size):
        return image
    chunks = []
    for start in range(0, len(image), 10_000):
        chunk = image[start : start + 10_000].astype(np.float32)
        shape = (len(chunk), size, size, image.shape[-1])
        chunks.append(np.asarray(jax.image.resize(chunk, shape, "bilinear")))
    return np.concatenate(chunks).round().clip(0, 255).astype(np.uint8)


def fit(images: Sequence[np.ndarray], info: Info) -> np.ndarray:
    """Images uint8 [H, W, D] of any sizes as [N, *image_shape], grey ones repeated."""
    if len({image.shape for image in images}) == 1:
        result = resize(np.stack(images), info.image_size)
    else:
        size = (info.image_size, info.image_size)
        result = np.stack(
            [
                np.asarray(
                    Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
                )
                for image in images
            ]
        )
    return np.ascontiguousarray(
        np.broadcast_to(result, (len(result), *info.image_shape))
    )


def decode(content: bytes, size: int, mode: str = "RGB") -> np.ndarray:
    """An image file as uint8 [size, size, D]; D is 1 for mode "L", 3 for "RGB".

    Raises:
      OSError, ValueError and others: it is no image that can be read.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = file.convert(mode).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(size, size, -1)


def nearest_size(side: float) -> int:
    """The image size, one of `IMAGE_SIZES`, for images of about `side` pixels."""
    return next((s for s in IMAGE_SIZES if side <= 1.5 * s), IMAGE_SIZES[-1])
