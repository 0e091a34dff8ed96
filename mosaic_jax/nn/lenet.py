"""LeNet-5, and the convolutional network of FedAvg: pooled maps, then dense layers."""

import itertools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.conv import convolve
from mosaic_jax.nn.resnet import Linear, fan_in_uniform


class Layer(nn.Module):
    """Convolution with bias, initialised as PyTorch does it.

    Attributes:
      features: channels of the output.
      size: side length of the kernel; 0: that of the map, a dense layer.
      padding: zeros on each side.
      lowering: one of `conv.LOWERINGS`.
    """

    features: int
    size: int = 0
    padding: int = 0
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.size and x.shape[1] != x.shape[2]:
            raise ValueError("must be squares, as its dense layers take the whole map")
        size = self.size or x.shape[1]
        shape = (size, size, x.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_uniform, shape).astype(x.dtype)
        bound = math.prod(shape[:-1]) ** -0.5

        def bias_init(key: jax.Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        bias = self.param("bias", bias_init, (self.features,)).astype(x.dtype)
        y = convolve(x, kernel, 1, self.padding, self.lowering)
        return y + shapes.last(bias, y.ndim)


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, as FL code has it.

    Two 5 x 5 convolutions with bias, each pooled to half the side, then dense layers. A
    dense layer is a convolution by kernels as large as the map, so that it has channels
    as any other.

    Attributes:
      num_classes: K, size of the output.
      width: 64 is the published network; others have their channels in proportion.
      dtype: of activations; parameters and logits are float32.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      rate: fraction of the channels of every hidden layer that this network has.
      scale: factor of the layers' outputs in training.
    """

    # Channels of the convolutions and units of the dense layers; zeros around maps.
    MAPS: ClassVar[tuple[int, ...]] = (6, 16)
    UNITS: ClassVar[tuple[int, ...]] = (120, 84)
    PADDING: ClassVar[int] = 0

    num_classes: int
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"
    rate: float = 1.0
    scale: float = 1.0

    def setup(self) -> None:
        """Convolutions, dense layers, classifier."""
        kept = [submodel.kept(width, self.rate) for width in self.widths.values()]
        count = len(self.MAPS)
        maps = [Layer(n, 5, self.PADDING, self.lowering) for n in kept[:count]]
        self.layers = maps + [Layer(n, lowering=self.lowering) for n in kept[count:]]
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each channel space at rate 1; see `submodel`."""
        return {
            f"layer{i}": math.ceil(channels * self.width / 64)
            for i, channels in enumerate((*self.MAPS, *self.UNITS))
        }

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of the input and the output of each layer."""
        names = [None, *self.widths]
        layers: dict[str, tuple[str | None, str | None]] = {
            f"layers_{i}": pair for i, pair in enumerate(itertools.pairwise(names))
        }
        return layers | {"fc": (names[-1], submodel.CLASSES)}

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Output of the last hidden layer.

        Args:
          x: normalised images [B, H, W, D] float32.
          train: whether outputs are multiplied by `scale`.
          mask: makes no difference.

        Returns:
          [B, F] float32.
        """
        del mask
        x = x.astype(self.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x) * (self.scale if train else 1.0)
            x = nn.relu(halved(x) if i < len(self.MAPS) else x)
        return x[:, 0, 0].astype(jnp.float32)

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))


class FedAvgCNN(LeNet5):
    """The CNN of McMahan et al. (2017): 32 and 64 channels, then 512 units.

    Convolutions keep the size of the map; attributes as of `LeNet5`.
    """

    MAPS: ClassVar[tuple[int, ...]] = (32, 64)
    UNITS: ClassVar[tuple[int, ...]] = (512,)
    PADDING: ClassVar[int] = 2


def halved(x: Array) -> Array:
    """Maxima [B, H // 2, W // 2, C] of 2 x 2 pixels of `x` [B, H, W, C]."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.max(x, axis=(2, 4))
