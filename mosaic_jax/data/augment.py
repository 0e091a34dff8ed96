"""Conversions and augmentations of images, for use within jitted functions.

Images outside of a classifier are signed, in [-1, 1], real and generated ones alike; a
classifier normalises its input itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array


def to_signed(image: Array) -> Array:
    """Images uint8 [...] as float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Array) -> Array:
    """Inverse of `to_signed`, with rounding."""
    return jnp.clip(jnp.round((image + 1) * 127.5), 0, 255).astype(jnp.uint8)


def normalise(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Standardise signed images by the moments of their data set.

    Args:
      image: [..., D] float32 in [-1, 1].
      mean: [D], on the scale where black is 0 and white is 1.
      std: [D], standard deviation on the same scale.
    """
    centre, spread = (shapes.last(jnp.array(each), image.ndim) for each in (mean, std))
    return ((image + 1) / 2 - centre) / spread


def denormalise(image: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Inverse of `normalise`.

    Args:
      image: [..., D] float32, standardised.
      mean: [D], on the scale where black is 0 and white is 1.
      std: [D], standard deviation on the same scale.
    """
    centre, spread = (shapes.last(jnp.array(each), image.ndim) for each in (mean, std))
    return 2 * (image * spread + centre) - 1


def crop_flip(key: Array, image: Array, *, padding: int = 4) -> Array:
    """Random crop of each black-padded image, mirrored with probability 1/2.

    Args:
      key: random key.
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
    """Shift each image by a random number of pixels in both directions.

    Args:
      key: random key.
      image: [B, H, W, D] float32.
      pixels: the largest shift each way.
      black: [] or [D], fills what the shift uncovers; -1 is black of signed images.
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


# (key, signed images [B, H, W, D]) -> images of the same shape.
AUGMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda key, image: image,
    "crop_flip": crop_flip,
}


def augment(name: str, key: Array, image: Array) -> Array:
    """Augment images.

    Args:
      name: one of `AUGMENTATIONS`.
      key: random key.
      image: [B, H, W, D] float32 in [-1, 1].
    """
    return AUGMENTATIONS[name](key, image)
