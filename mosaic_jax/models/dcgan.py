"""The DCGAN pair (Radford et al., 2016) for 16, 32 and 64 pixel images.

The published pair is the 32 pixel one; the others drop or add one doubling.
"""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models import submodel
from mosaic_jax.models.conv import Conv, ConvTranspose
from mosaic_jax.models.norm import BatchNorm
from mosaic_jax.types import Array

IMAGE_SIZES = (16, 32, 64)
NORMAL = nn.initializers.normal(0.02)


def _scale_init(key: Array, shape: tuple[int, ...]) -> Array:
    return 1 + NORMAL(key, shape)


def batch_norm() -> BatchNorm:
    """With the pair's initial scales, N(1, 0.02)."""
    return BatchNorm(scale_init=_scale_init)


def doublings(image_size: int) -> int:
    """Stride-2 steps between a 4 pixel map and the image."""
    return IMAGE_SIZES.index(image_size) + 2


class Generator(nn.Module):
    """Noise [B, nz] to images [B, image_size, image_size, channels] in [-1, 1]."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"

    def setup(self) -> None:
        """4 x 4 from noise, doublings, a 1 x 1 output layer."""
        widths = list(self.widths.values())
        self.convs = [ConvTranspose(widths[0], 4, 1, 0, NORMAL, self.lowering)] + [
            ConvTranspose(width, 4, 2, 1, NORMAL, self.lowering) for width in widths[1:]
        ]
        self.norms = [batch_norm() for _ in widths]
        self.out = ConvTranspose(self.channels, 1, 1, 0, NORMAL, self.lowering)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space; see `submodel`."""
        count = doublings(self.image_size)
        return {f"map{i}": self.width * 2 ** (count - i) for i in range(count + 1)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of each layer; kernels here are [k, k, out, in]."""
        names = [None, *self.widths]
        layers = {}
        for i, (into, out) in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = (out, into)
            layers[f"norms_{i}"] = (None, out)
        return layers | {"out": (None, names[-1])}

    def __call__(self, z: Array, *, train: bool) -> Array:
        """Images of noise `z` [B, nz] float32, standard normal."""
        x = z[:, None, None, :].astype(self.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.relu(norm(conv(x), train=train))
        return jnp.tanh(self.out(x).astype(jnp.float32))


class Discriminator(nn.Module):
    """Images in [-1, 1] to logits [B] (positive: real).

    Reference: the published network ends in a sigmoid; training on logits is the
    same loss and stable.
    """

    image_size: int = 32
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"

    def setup(self) -> None:
        """Halvings down to 2 x 2, then one number."""
        widths = list(self.widths.values())
        self.convs = [Conv(width, 4, 2, 1, NORMAL, self.lowering) for width in widths]
        self.norms = [batch_norm() for _ in widths[1:]]
        self.out = Conv(1, 2, 2, 0, NORMAL, self.lowering)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space; see `submodel`."""
        count = doublings(self.image_size)
        return {f"map{i}": self.width * 2**i for i in range(count + 1)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of each layer; the first has no batch-norm."""
        names = [None, *self.widths]
        layers = {}
        for i, (into, out) in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = (into, out)
            layers[f"norms_{i - 1}"] = (None, out)
        del layers["norms_-1"]
        return layers | {"out": (names[-1], None)}

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B] of `x` [B, image_size, image_size, channels]."""
        x = nn.leaky_relu(self.convs[0](x.astype(self.dtype)), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = nn.leaky_relu(norm(conv(x), train=train, mask=mask), 0.2)
        return self.out(x).reshape(len(x)).astype(jnp.float32)
