"""ResNets with a CIFAR stem (He et al., 2016; the published Mosaic classifier)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.conv import Conv
from mosaic_jax.nn.norm import NORMS, relu

# Name to the kind of block, and the numbers of blocks in the four groups.
DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


def fan_in_uniform(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Array:
    """PyTorch's initialiser of convolutions and linear layers, U(+-1 / sqrt(fan in)).

    Args:
      key: random key.
      shape: of the kernel; the fan in is the product of all axes but the last.
      dtype: of the kernel.
    """
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv(features: int, size: int, stride: int = 1, lowering: str = "auto") -> Conv:
    """Convolution without bias whose padding keeps the size of maps at stride 1.

    Args:
      features: channels of the output.
      size: side length of the kernel, odd.
      stride: in both directions.
      lowering: one of `conv.LOWERINGS`.
    """
    return Conv(features, size, stride, (size - 1) // 2, fan_in_uniform, lowering)


class Linear(nn.Module):
    """Dense layer with PyTorch's initialisation of kernel and bias."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", fan_in_uniform, (fan_in, self.features))

        def bias_init(key: jax.Array, shape: tuple[int, ...]) -> Array:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        bias = self.param("bias", bias_init, (self.features,))
        return x @ kernel + shapes.last(bias, x.ndim)


class Block(nn.Module):
    """Residual block of convolutions 3x3, 3x3, or 1x1, 3x3, 1x1.

    Attributes:
      width: channels within the block.
      out: channels of its output.
      stride: of one of the 3x3 convolutions.
      bottleneck: whether it has three convolutions.
      project: whether the shortcut has a 1x1 convolution.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      norm: a key of `norm.NORMS`.
      scale: factor of the convolutions' outputs in training.
    """

    width: int
    out: int
    stride: int
    bottleneck: bool
    project: bool
    lowering: str = "auto"
    norm: str = "batch"
    scale: float = 1.0

    def setup(self) -> None:
        """Create the layers, named as in the published state dicts."""
        out = self.out
        if self.bottleneck:
            self.conv1 = conv(self.width, 1, lowering=self.lowering)
            self.conv2 = conv(self.width, 3, self.stride, lowering=self.lowering)
            self.conv3 = conv(out, 1, lowering=self.lowering)
            self.bn3 = NORMS[self.norm](input_scale=self.scale)
            slope = 0.0
        else:
            slope = None
            self.conv1 = conv(self.width, 3, self.stride, lowering=self.lowering)
            self.conv2 = conv(out, 3, lowering=self.lowering)
        self.bn1 = NORMS[self.norm](input_scale=self.scale, slope=0.0)
        self.bn2 = NORMS[self.norm](input_scale=self.scale, slope=slope)
        if self.project:
            self.shortcut_conv = conv(out, 1, self.stride, lowering=self.lowering)
            self.shortcut_bn = NORMS[self.norm](input_scale=self.scale)

    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Apply the block.

        Args:
          x: [B, H, W, I].
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B, H / stride, W / stride, out].
        """
        h = self.bn1(self.conv1(x), train=train, mask=mask)
        h = self.bn2(self.conv2(h), train=train, mask=mask)
        if self.bottleneck:
            h = self.bn3(self.conv3(h), train=train, mask=mask)
        if self.project:
            x = self.shortcut_bn(self.shortcut_conv(x), train=train, mask=mask)
        return relu(h + x)


class ResNet(nn.Module):
    """ResNet for small images.

    Attributes:
      num_classes: K, size of the output.
      depth: a key of `DEPTHS`.
      width: channels of the first group; the others have 2, 4 and 8 times as many.
      dtype: of activations; parameters, moments and logits are float32.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      norm: a key of `norm.NORMS`.
      rate: fraction of the channels of every hidden layer that this network has.
      scale: factor of the convolutions' outputs in training.
    """

    num_classes: int
    depth: str = "resnet18"
    width: int = 64
    dtype: str = "float32"
    lowering: str = "auto"
    norm: str = "batch"
    rate: float = 1.0
    scale: float = 1.0

    def setup(self) -> None:
        """Stem, four groups of blocks, classifier."""
        kept = {name: submodel.kept(n, self.rate) for name, n in self.widths.items()}
        self.conv1 = conv(kept[self._stem], 3, lowering=self.lowering)
        self.bn1 = NORMS[self.norm](input_scale=self.scale, slope=0.0)
        self.blocks = {
            name: Block(
                kept[f"{name}/1"],
                kept[f"stream{group}"],
                stride,
                self._bottleneck,
                project,
                self.lowering,
                self.norm,
                self.scale,
            )
            for name, group, stride, project in self._plan()
        }
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels of each channel space at rate 1.

        A space is a set of channels that several layers share. "stream1" to "stream4"
        are those of the residual sums of each group, "BLOCK/1" (and "BLOCK/2" of a
        block with three convolutions) lie within one block, "stem" is before a first
        block that projects.
        """
        wide = 4 if self._bottleneck else 1
        widths = {self._stem: self.width}
        for name, group, _, _ in self._plan():
            inner = self.width * 2 ** (group - 1)
            widths[f"stream{group}"] = inner * wide
            widths[f"{name}/1"] = inner
            if self._bottleneck:
                widths[f"{name}/2"] = inner
        return widths

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of the input and the output of each layer."""
        found: dict[str, tuple[str | None, str | None]] = {
            "conv1": (None, self._stem),
            "bn1": (None, self._stem),
        }
        # flax calls a module in the dict `blocks` "blocks_" and its key.
        into = self._stem
        for name, group, _, project in self._plan():
            block, stream = f"blocks_{name}", f"stream{group}"
            inner = [f"{name}/{i}" for i in range(1, 3 if self._bottleneck else 2)]
            pairs = zip([into, *inner], [*inner, stream], strict=True)
            for i, pair in enumerate(pairs, start=1):
                found[f"{block}/conv{i}"] = found[f"{block}/bn{i}"] = pair
            if project:
                found[f"{block}/shortcut_conv"] = (into, stream)
                found[f"{block}/shortcut_bn"] = (into, stream)
            into = stream
        return found | {"fc": (into, submodel.CLASSES)}

    @property
    def _bottleneck(self) -> bool:
        return DEPTHS[self.depth][0] == "bottleneck"

    @property
    def _stem(self) -> str:
        return "stem" if self._bottleneck else "stream1"

    def _plan(self) -> list[tuple[str, int, int, bool]]:
        """Name, group, stride, and whether the shortcut projects, of each block."""
        return [
            (
                f"layer{group}_{i}",
                group,
                2 if group > 1 and i == 0 else 1,
                i == 0 and (group > 1 or self._bottleneck),
            )
            for group, count in enumerate(DEPTHS[self.depth][1], start=1)
            for i in range(count)
        ]

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Pooled penultimate features.

        Args:
          x: normalised images [B, H, W, D] float32.
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B, F] float32.
        """
        x = self.conv1(x.astype(self.dtype))
        x = self.bn1(x, train=train, mask=mask)
        for block in self.blocks.values():
            x = block(x, train=train, mask=mask)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))
