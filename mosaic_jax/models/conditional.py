"""Generators that the server of a data-free method trains.

Sizes are those of the original code for 32 pixel images; 16 and 64 drop or add one
doubling.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax import shapes
from mosaic_jax.models.conv import Conv, ConvTranspose
from mosaic_jax.models.dcgan import NORMAL, batch_norm, doublings
from mosaic_jax.models.norm import BatchNorm
from mosaic_jax.models.resnet import Linear
from mosaic_jax.types import Array


class _Upsampled(nn.Module):
    """A map [B, s, s, 2 width] to an image [B, 4 s, 4 s, channels], not bounded.

    Convolutions after nearest-neighbour doublings. Biases before a batch-norm, which
    takes them out again, are left out.
    """

    channels: int
    width: int
    lowering: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = batch_norm()(x, train=train)
        for width in (2 * self.width, self.width):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = Conv(width, 3, 1, 1, NORMAL, self.lowering)(x)
            x = nn.leaky_relu(batch_norm()(x, train=train), 0.2)
        x = Conv(self.channels, 3, 1, 1, NORMAL, self.lowering)(x)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return x + shapes.last(bias, x.ndim)


class DenseGenerator(nn.Module):
    """DENSE's: noise [B, nz] to signed images; it knows no labels."""

    image_size: int = 32
    channels: int = 3
    width: int = 64
    lowering: str = "auto"

    @nn.compact
    def __call__(self, z: Array, *, train: bool) -> Array:
        """Images [B, H, W, D] in [-1, 1]; the original's sigmoid is on [0, 1]."""
        side = self.image_size // 4
        x = Linear(2 * self.width * side**2)(z)
        x = x.reshape(len(z), side, side, 2 * self.width)
        upsampled = _Upsampled(self.channels, self.width, self.lowering)
        return 2 * nn.sigmoid(upsampled(x, train=train)) - 1


class FedFTGGenerator(nn.Module):
    """FedFTG's: noise and label to images of zero mean and unit deviation."""

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    width: int = 64
    lowering: str = "auto"

    @nn.compact
    def __call__(self, z: Array, label: Array, *, train: bool) -> Array:
        """Normalised images [B, H, W, D] of `z` [B, nz] and `label` [B]."""
        side = self.image_size // 4
        features = self.width * side**2
        label = jax.nn.one_hot(label, self.num_classes)
        x = [Linear(features)(z), Linear(features)(label)]
        x = [one.reshape(len(z), side, side, self.width) for one in x]
        upsampled = _Upsampled(self.channels, self.width, self.lowering)
        x = jnp.tanh(upsampled(jnp.concatenate(x, axis=-1), train=train))
        return BatchNorm(affine=False)(x, train=train)


class DFRDGenerator(nn.Module):
    """DFRD's: noise merged with a learned embedding of the label, then a DCGAN."""

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    latent_dim: int = 100
    width: int = 128
    lowering: str = "auto"

    def setup(self) -> None:
        """4 x 4 from the merged vector, doublings to the image."""
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
        self.norms = [batch_norm() for _ in widths[1:]]

    def merge(self, z: Array, label: Array) -> Array:
        """Noise [B, nz] times the label's embedding."""
        return z * self.embedding[label]

    def __call__(self, z: Array, label: Array, *, train: bool) -> tuple[Array, Array]:
        """Images [B, H, W, D] in [-1, 1], and the merged vectors [B, nz]."""
        merged = self.merge(z, label)
        x = nn.relu(self.convs[0](merged[:, None, None, :]))
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            x = nn.relu(norm(conv(x), train=train))
        return jnp.tanh(self.convs[-1](x)), merged
