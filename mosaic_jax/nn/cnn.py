"""A plain convolutional network, for clients with another network than the server."""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.norm import NORMS
from mosaic_jax.nn.resnet import Linear, conv


class CNN(nn.Module):
    """Four 3 x 3 convolutions with norms; all but the first halve the map.

    The attributes are those of `resnet.ResNet`; the layers have 1, 2, 4 and 8 times
    `width` channels, like the groups there.
    """

    num_classes: int
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"
    norm: str = "batch"
    rate: float = 1.0
    scale: float = 1.0

    def setup(self) -> None:
        """Convolutions, norms, classifier."""
        kept = [submodel.kept(width, self.rate) for width in self.widths.values()]
        self.convs = [
            conv(width, 3, 1 if i == 0 else 2, lowering=self.lowering)
            for i, width in enumerate(kept)
        ]
        norm = NORMS[self.norm]
        self.norms = [norm(input_scale=self.scale, slope=0.0) for _ in kept]
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space at rate 1; see `submodel`."""
        return {f"map{i}": self.width * 2**i for i in range(4)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of the input and the output of each layer."""
        names = [None, *self.widths]
        layers: dict[str, tuple[str | None, str | None]] = {}
        for i, pair in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = layers[f"norms_{i}"] = pair
        return layers | {"fc": (names[-1], submodel.CLASSES)}

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Pooled features.

        Args:
          x: normalised images [B, H, W, D] float32.
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B, 8 width] float32.
        """
        x = x.astype(self.dtype)
        for conv_, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv_(x), train=train, mask=mask)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))
