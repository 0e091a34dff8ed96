"""ResNets with a CIFAR stem (He et al., 2016; the published Mosaic classifier)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.models.conv import Conv
from mosaic_jax.models.norm import NORMS
from mosaic_jax.types import Array

# name: (block, blocks per group)
DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


def fan_in_uniform(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """PyTorch's default for convolutions and linear layers: U(+-1/sqrt(fan in))."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(features: int, size: int, stride: int = 1, lowering: str = "auto") -> Conv:
    """Bias-free convolution, padded to keep the side length at stride 1."""
    return Conv(features, size, stride, (size - 1) // 2, fan_in_uniform, lowering)


class Linear(nn.Module):
    """Dense layer with PyTorch's initialisation of kernel and bias."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", fan_in_uniform, (fan_in, self.features))

        def bias_init(key: Array, shape: tuple[int, ...]) -> Array:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        return x @ kernel + self.param("bias", bias_init, (self.features,))


class Block(nn.Module):
    """Residual block; `bottleneck` is 1x1, 3x3, 1x1 with expansion 4, else 3x3, 3x3."""

    width: int
    stride: int
    bottleneck: bool
    project: bool
    lowering: str = "auto"
    norm: str = "batch"

    def setup(self) -> None:
        """Name the layers as the published state dicts do."""
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            self.conv1 = conv(self.width, 1, lowering=self.lowering)
            self.conv2 = conv(self.width, 3, self.stride, lowering=self.lowering)
            self.conv3 = conv(out, 1, lowering=self.lowering)
            self.bn3 = NORMS[self.norm]()
        else:
            self.conv1 = conv(self.width, 3, self.stride, lowering=self.lowering)
            self.conv2 = conv(out, 3, lowering=self.lowering)
        self.bn1 = NORMS[self.norm]()
        self.bn2 = NORMS[self.norm]()
        if self.project:
            self.shortcut_conv = conv(out, 1, self.stride, lowering=self.lowering)
            self.shortcut_bn = NORMS[self.norm]()

    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """[B, H, W, in] to [B, H/stride, W/stride, out]."""
        h = nn.relu(self.bn1(self.conv1(x), train=train, mask=mask))
        h = self.bn2(self.conv2(h), train=train, mask=mask)
        if self.bottleneck:
            h = self.bn3(self.conv3(nn.relu(h)), train=train, mask=mask)
        if self.project:
            x = self.shortcut_bn(self.shortcut_conv(x), train=train, mask=mask)
        return nn.relu(h + x)


class ResNet(nn.Module):
    """ResNet for small images.

    Attributes:
      num_classes: size of the output.
      depth: a key of `DEPTHS`.
      width: channels of the first group; the others have 2, 4 and 8 times as many.
      dtype: of activations; parameters, moments and logits are float32.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      norm: a key of `norm.NORMS`.
    """

    num_classes: int
    depth: str = "resnet18"
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"
    norm: str = "batch"

    def setup(self) -> None:
        """Stem, four groups of blocks, classifier."""
        kind, counts = DEPTHS[self.depth]
        bottleneck = kind == "bottleneck"
        self.conv1 = conv(self.width, 3, lowering=self.lowering)
        self.bn1 = NORMS[self.norm]()
        blocks, channels = {}, self.width
        for group, count in enumerate(counts):
            width = self.width * 2**group
            out = width * (4 if bottleneck else 1)
            for i in range(count):
                stride = 2 if group > 0 and i == 0 else 1
                project = stride != 1 or channels != out
                shape = (width, stride, bottleneck, project)
                block = Block(*shape, self.lowering, self.norm)
                blocks[f"layer{group + 1}_{i}"] = block
                channels = out
        self.blocks = blocks
        self.fc = Linear(self.num_classes)

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Pooled penultimate features [B, F] of normalised images `x` [B, H, W, D]."""
        x = self.conv1(x.astype(self.dtype))
        x = nn.relu(self.bn1(x, train=train, mask=mask))
        for block in self.blocks.values():
            x = block(x, train=train, mask=mask)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K] of normalised images `x` [B, H, W, D] float32."""
        return self.head(self.features(x, train=train, mask=mask))
