"""A small vision transformer (Dosovitskiy et al., 2021)."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array
from mosaic_jax.nn.norm import LayerNorm
from mosaic_jax.nn.resnet import Linear

HEADS = 3
_EPSILON = 1e-6
_INIT = nn.initializers.truncated_normal(0.02)


class Dense(nn.Module):
    """Linear layer in the type of its input."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel.astype(x.dtype) + shapes.last(bias.astype(x.dtype), x.ndim)


class Embedding(nn.Module):
    """Tokens [B, 1 + N, dim] of images: a class token, then one of each patch.

    Attributes:
      dim: size of a token.
      patch: side of a patch in pixels; divides that of the image.
    """

    dim: int
    patch: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"sides must be multiples of {self.patch}, the patch")
        side, depth = self.patch, x.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (side, side, depth, self.dim))
        bias = self.param("bias", nn.initializers.zeros, (self.dim,))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(len(x), rows, side, columns, side, depth).swapaxes(2, 3)
        x = x.reshape(len(x), rows * columns, -1)
        x = x @ kernel.astype(x.dtype).reshape(-1, self.dim)
        x = x + shapes.last(bias.astype(x.dtype), x.ndim)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim))
        place = self.param("position", _INIT, (1, 1 + rows * columns, self.dim))
        first = jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, self.dim))
        return jnp.concatenate([first, x], axis=1) + place.astype(x.dtype)


class Block(nn.Module):
    """Self-attention, then two dense layers, each after a norm and added to its input.

    Tokens [B, T, dim] to tokens.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dim = x.shape[-1]
        h = Dense(3 * dim, name="qkv")(_normed("norm1", x))
        # [3, B, heads, T, dim / heads]
        h = h.reshape(*h.shape[:2], 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
        query, key, value = h
        weight = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        weight = jax.nn.softmax(weight.astype(jnp.float32)).astype(x.dtype)
        h = (weight @ value).swapaxes(1, 2).reshape(x.shape)
        x = x + Dense(dim, name="out")(h)
        h = Dense(4 * dim, name="fc1")(_normed("norm2", x))
        return x + Dense(dim, name="fc2")(nn.gelu(h, approximate=False))


class ViT(nn.Module):
    """The tiny ViT of Touvron et al. (2021) with half of its layers and small patches.

    It has no dropout, and no norm but layer-norm.

    Attributes:
      num_classes: K, size of the output.
      width: size of each of the three heads; 64 as published, tokens of 192 numbers.
      depth: number of blocks.
      patch: side of a patch in pixels.
      dtype: of activations; parameters, moments and logits are float32.
    """

    # Of the settings of the model: what has no choice here.
    ALWAYS: ClassVar[Mapping[str, str]] = {"norm": "layer"}

    num_classes: int
    width: int = 64
    depth: int = 6
    patch: int = 4
    dtype: str = "float32"

    def setup(self) -> None:
        """Embedding, blocks, the last norm, classifier."""
        self.embedding = Embedding(HEADS * self.width, self.patch)
        self.blocks = [Block() for _ in range(self.depth)]
        self.norm_out = LayerNorm(epsilon=_EPSILON)
        self.fc = Linear(self.num_classes)

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """The class token after the last block, normalised.

        Args:
          x: normalised images [B, H, W, D] float32, of sides that `patch` divides.
          train: makes no difference.
          mask: makes no difference.

        Returns:
          [B, 3 width] float32.
        """
        del train, mask
        x = self.embedding(x.astype(self.dtype))
        for block in self.blocks:
            x = block(x)
        return _per_token(self.norm_out, x[:, 0]).astype(jnp.float32)

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))


def _normed(name: str, x: Array) -> Array:
    """Tokens by a new layer-norm of the module that calls this."""
    return _per_token(LayerNorm(epsilon=_EPSILON, name=name), x)


def _per_token(norm: LayerNorm, x: Array) -> Array:
    """Each of the tokens [..., dim] normalised by itself."""
    return norm(x.reshape(-1, 1, 1, x.shape[-1]), train=False).reshape(x.shape)
