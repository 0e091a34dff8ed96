"""Generator and discriminator of DCGAN (Radford et al., 2016).

The published networks are those for 32 pixels; for 16 and 64 pixels there is one
doubling less or more.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import errors
from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.conv import Conv, ConvTranspose
from mosaic_jax.nn.norm import BatchNorm, GroupNorm

IMAGE_SIZES = (16, 32, 64)
NORMAL = nn.initializers.normal(0.02)
# Of the discriminator's leaky ReLU.
_SLOPE = 0.2


def _scale_init(key: jax.Array, shape: tuple[int, ...]) -> Array:
    return 1 + NORMAL(key, shape)


def batch_norm(slope: float | None) -> BatchNorm:
    """Batch-norm, initial scales from N(1, 0.02), and a leaky ReLU; None: none."""
    return BatchNorm(scale_init=_scale_init, slope=slope)


def side_of(image_shape: tuple[int, int, int]) -> int:
    """Height and width of generated images of `image_shape` (H, W, D), in pixels.

    Raises:
      ConfigError: no generator draws such images.
    """
    height, width, _ = image_shape
    if height != width or height not in IMAGE_SIZES:
        sides = ", ".join(map(str, IMAGE_SIZES))
        raise errors.ConfigError(
            f"data.size: images of {height} x {width} pixels: must be squares of"
            f" {sides} pixels, which generators draw"
        )
    return height


def doublings(image_size: int) -> int:
    """Number of doublings from a map of 4 pixels to the image."""
    return IMAGE_SIZES.index(image_size) + 2


class Generator(nn.Module):
    """Noise [B, nz] to images [B, image_size, image_size, channels] in [-1, 1]."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"

    def setup(self) -> None:
        """A 4 x 4 map of the noise, doublings, a 1 x 1 convolution."""
        widths = list(self.widths.values())
        self.convs = [ConvTranspose(widths[0], 4, 1, 0, NORMAL, self.lowering)] + [
            ConvTranspose(width, 4, 2, 1, NORMAL, self.lowering) for width in widths[1:]
        ]
        self.norms = [batch_norm(0.0) for _ in widths]
        self.out = ConvTranspose(self.channels, 1, 1, 0, NORMAL, self.lowering)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space; see `submodel`."""
        count = doublings(self.image_size)
        return {f"map{i}": self.width * 2 ** (count - i) for i in range(count + 1)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of each layer's kernel [k, k, out, in], see `submodel`."""
        names = [None, *self.widths]
        layers: dict[str, tuple[str | None, str | None]] = {}
        for i, (into, out) in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = (out, into)
            layers[f"norms_{i}"] = (None, out)
        return layers | {"out": (None, names[-1])}

    def __call__(self, z: Array, *, train: bool) -> Array:
        """Images of noise `z` [B, nz] float32, standard normal."""
        x = z[:, None, None, :].astype(self.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), train=train)
        return jnp.tanh(self.out(x).astype(jnp.float32))


class Discriminator(nn.Module):
    """Images in [-1, 1] to logits [B]; positive logits mean real.

    Reference: the published network ends in a sigmoid. The loss on logits is the same,
    and numerically stable. With `norm` = "group" it looks at each image by itself.
    """

    image_size: int = 32
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"
    norm: str = "batch"

    def setup(self) -> None:
        """Halvings to a map of 2 x 2 pixels, then one number."""
        widths = list(self.widths.values())
        self.convs = [Conv(width, 4, 2, 1, NORMAL, self.lowering) for width in widths]
        if self.norm == "group":
            self.norms = [GroupNorm(slope=_SLOPE) for _ in widths[1:]]
        else:
            self.norms = [batch_norm(_SLOPE) for _ in widths[1:]]
        self.out = Conv(1, 2, 2, 0, NORMAL, self.lowering)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space; see `submodel`."""
        count = doublings(self.image_size)
        return {f"map{i}": self.width * 2**i for i in range(count + 1)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of each layer; no norm follows the first convolution."""
        names = [None, *self.widths]
        layers: dict[str, tuple[str | None, str | None]] = {}
        for i, (into, out) in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = (into, out)
            layers[f"norms_{i - 1}"] = (None, out)
        del layers["norms_-1"]
        return layers | {"out": (names[-1], None)}

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits.

        Args:
          x: images [B, image_size, image_size, channels].
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B] float32.
        """
        x = nn.leaky_relu(self.convs[0](x.astype(self.dtype)), _SLOPE)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = norm(conv(x), train=train, mask=mask)
        return self.out(x).reshape(len(x)).astype(jnp.float32)
