"""A network of layers over patches: no convolution, no batch-norm."""

import flax.linen as nn

from mosaic_jax.core.types import Array

PATCH = 4


class PatchNet(nn.Module):
    """The same two layers for every patch of 4 x 4 pixels, then their mean.

    Attributes:
      num_classes: K.
      width: features of a patch; from `config.model.width`.
    """

    num_classes: int
    width: int = 32

    def setup(self) -> None:
        """Layers."""
        self.first = nn.Dense(4 * self.width)
        self.second = nn.Dense(8 * self.width)
        self.classes = nn.Dense(self.num_classes)

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Features [B, 8 width] of normalised images `x` [B, H, W, D]."""
        del train, mask  # of no concern without batch-norm
        batch, height, width, depth = x.shape
        x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, depth)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, PATCH * PATCH * depth)
        return nn.relu(self.second(nn.relu(self.first(x)))).mean(axis=1)

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.classes(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K] of normalised images `x` [B, H, W, D] float32."""
        return self.head(self.features(x, train=train, mask=mask))
