"""Generators of the data-free methods, which train them on the server.

Sizes are those of the original code for images of 32 pixels; for 16 and 64 pixels there
is one doubling less or more.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array
from mosaic_jax.nn.conv import Conv, ConvTranspose
from mosaic_jax.nn.dcgan import NORMAL, batch_norm, doublings
from mosaic_jax.nn.norm import BatchNorm
from mosaic_jax.nn.resnet import Linear


class _Upsampled(nn.Module):
    """A map [B, s, s, 2 width] to unbounded images [B, 4 s, 4 s, channels].

    Convolutions after nearest-neighbour doublings. There are no biases before
    batch-norms, which would remove them.
    """

    channels: int
    width: int
    lowering: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = batch_norm(None)(x, train=train)
        for width in (2 * self.width, self.width):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = Conv(width, 3, 1, 1, NORMAL, self.lowering)(x)
            x = batch_norm(0.2)(x, train=train)
        x = Conv(self.channels, 3, 1, 1, NORMAL, self.lowering)(x)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return x + shapes.last(bias, x.ndim)


class DenseGenerator(nn.Module):
    """Generator of DENSE (Zhang et al., 2022), not conditioned on labels."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    lowering: str = "auto"

    @nn.compact
    def __call__(self, z: Array, *, train: bool) -> Array:
        """Images [B, H, W, D] in [-1, 1] of noise `z` [B, nz].

        Reference: those of the original code are in [0, 1].
        """
        side = self.image_size // 4
        x = Linear(2 * self.width * side**2)(z)
        x = x.reshape(len(z), side, side, 2 * self.width)
        upsampled = _Upsampled(self.channels, self.width, self.lowering)
        return 2 * nn.sigmoid(upsampled(x, train=train)) - 1


class FedFTGGenerator(nn.Module):
    """Conditional generator of FedFTG (Zhang et al., 2022) of standardised images."""

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    width: int = 64
    lowering: str = "auto"

    @nn.compact
    def __call__(self, z: Array, label: Array, *, train: bool) -> Array:
        """Images of zero mean and unit deviation.

        Args:
          z: noise [B, nz].
          label: [B] int32, the class that each image should show.
          train: whether batch-norm uses, and updates by, the moments of the batch.

        Returns:
          [B, H, W, D] float32.
        """
        side = self.image_size // 4
        features = self.width * side**2
        one_hot = jax.nn.one_hot(label, self.num_classes)
        x = [Linear(features)(z), Linear(features)(one_hot)]
        x = [one.reshape(len(z), side, side, self.width) for one in x]
        upsampled = _Upsampled(self.channels, self.width, self.lowering)
        x = jnp.tanh(upsampled(jnp.concatenate(x, axis=-1), train=train))
        return BatchNorm(affine=False)(x, train=train)


class DFRDGenerator(nn.Module):
    """Conditional generator of DFRD (Luo et al., 2023).

    A DCGAN of noise multiplied by a learned embedding of the label.
    """

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    latent_dim: int = 100
    width: int = 128
    lowering: str = "auto"

    def setup(self) -> None:
        """A 4 x 4 map of the merged vector, then doublings to the image."""
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(1.0),
            (self.num_classes, self.latent_dim),
        )
        count = doublings(self.image_size)
        widths = [4 * self.width // 2**i for i in range(count)]
        self.convs = [ConvTranspose(widths[0], 4, 1, 0, NORMAL, self.lowering)] + [
            ConvTranspose(width, 4, 2, 1, NORMAL, self.lowering)
            for width in [*widths[1:], self.channels]
        ]
        self.norms = [batch_norm(0.0) for _ in widths[1:]]

    def merge(self, z: Array, label: Array) -> Array:
        """Noise `z` [B, nz] times the embedding of `label` [B]."""
        return z * self.embedding[label]

    def __call__(self, z: Array, label: Array, *, train: bool) -> tuple[Array, Array]:
        """Images, and the vectors that they are made of.

        Args:
          z: noise [B, nz].
          label: [B] int32, the class that each image should show.
          train: whether batch-norm uses, and updates by, the moments of the batch.

        Returns:
          Images [B, H, W, D] in [-1, 1] and merged vectors [B, nz].
        """
        merged = self.merge(z, label)
        x = nn.relu(self.convs[0](merged[:, None, None, :]))
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            x = norm(conv(x), train=train)
        return jnp.tanh(self.convs[-1](x)), merged
