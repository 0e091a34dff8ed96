"""Image arithmetic inside the jitted step.

Everything outside a classifier lives in [-1, 1], real images and generated ones
alike; a classifier normalises on entry.
"""

import jax
import jax.numpy as jnp

from mosaic_jax import shapes
from mosaic_jax.types import Array

AUGMENTATIONS = ("none", "crop_flip")


def to_signed(image: Array) -> Array:
    """uint8 [...] to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Array) -> Array:
    """Inverse of `to_signed`, rounding."""
    return jnp.clip(jnp.round((image + 1) * 127.5), 0, 255).astype(jnp.uint8)


def normalise(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Signed images [..., D] to zero mean and unit deviation of the data set.

    `mean` and `std` [D] are on the scale where black is 0 and white is 1.
    """
    mean, std = (shapes.last(jnp.array(each), image.ndim) for each in (mean, std))
    return ((image + 1) / 2 - mean) / std


def denormalise(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Inverse of `normalise`."""
    mean, std = (shapes.last(jnp.array(each), image.ndim) for each in (mean, std))
    return 2 * (image * std + mean) - 1


def crop_flip(key: Array, image: Array, *, padding: int = 4) -> Array:
    """Random crop of the black-padded image, then a mirror image half of the time.

    Args:
      key: typed key.
      image: [B, H, W, D] float32 in [-1, 1].
      padding: pixels added on each side before the crop.
    """
    crop_key, flip_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(len(image), 1, 1, 1))
    image = translate(crop_key, image, pixels=padding)
    return jnp.where(flip, image[:, :, ::-1], image)


def translate(
    key: Array, image: Array, *, pixels: int, black: float | Array = -1.0
) -> Array:
    """Shift each image [B, H, W, D] by up to `pixels` each way; `black` enters.

    `black` [] or [D] is that of the images' range; by default they are signed.
    """
    count, height, width, depth = image.shape
    shape = (count, height + 2 * pixels, width + 2 * pixels, depth)
    padded = jnp.broadcast_to(jnp.asarray(black, image.dtype), shape)
    inside = slice(pixels, pixels + height), slice(pixels, pixels + width)
    padded = padded.at[:, *inside].set(image)
    offset = jax.random.randint(key, (count, 2), 0, 2 * pixels + 1)

    def crop(one: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(one, start, (height, width, depth))

    return jax.vmap(crop)(padded, offset)


def augment(name: str, key: Array, image: Array) -> Array:
    """Apply the augmentation called `name`, one of `AUGMENTATIONS`."""
    return crop_flip(key, image) if name == "crop_flip" else image
