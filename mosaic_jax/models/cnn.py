"""A plain convolutional network, for clients whose network is not the server's."""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.models import submodel
from mosaic_jax.models.norm import NORMS
from mosaic_jax.models.resnet import Linear, conv
from mosaic_jax.types import Array


class CNN(nn.Module):
    """Four 3 x 3 convolutions, normalised, each after the first halving the map.

    Attributes as of `resnet.ResNet`; the layers have 1, 2, 4 and 8 times `width`
    channels, as the groups there.
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
        self.norms = [NORMS[self.norm](input_scale=self.scale) for _ in kept]
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space at rate 1; see `submodel`."""
        return {f"map{i}": self.width * 2**i for i in range(4)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces that go into and come out of each layer."""
        names = [None, *self.widths]
        layers = {}
        for i, pair in enumerate(itertools.pairwise(names)):
            layers[f"convs_{i}"] = layers[f"norms_{i}"] = pair
        return layers | {"fc": (names[-1], submodel.CLASSES)}

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Pooled features [B, 8 width] of normalised images `x` [B, H, W, D]."""
        x = x.astype(self.dtype)
        for conv_, norm in zip(self.convs, self.norms, strict=True):
            x = nn.relu(norm(conv_(x), train=train, mask=mask))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K] of normalised images `x` [B, H, W, D] float32."""
        return self.head(self.features(x, train=train, mask=mask))
