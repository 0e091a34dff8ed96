"""MobileNetV2 for small images (Sandler et al., 2018)."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.depthwise import Depthwise
from mosaic_jax.nn.norm import NORMS
from mosaic_jax.nn.resnet import Linear, conv, fan_in_uniform

# Of each stage: how many times the hidden channels are those of the input, channels of
# the output, number of blocks, stride of the first. As published, but that the stem and
# the second stage have stride 1, as is usual for images of 32 pixels.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280


def rounded(channels: float) -> int:
    """The nearest multiple of 8, of 8 at least and of 90 % of `channels` at least."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class InvertedResidual(nn.Module):
    """Block of a 1x1, a depthwise 3x3 and a 1x1 convolution, the last one linear.

    Attributes:
      hidden: channels within the block.
      out: channels of its output.
      stride: of the depthwise convolution.
      expands: whether the first convolution is there.
      residual: whether the input is added to the output.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      norm: a key of `norm.NORMS`.
      scale: factor of the convolutions' outputs in training.
    """

    hidden: int
    out: int
    stride: int
    expands: bool
    residual: bool
    lowering: str = "auto"
    norm: str = "batch"
    scale: float = 1.0

    def setup(self) -> None:
        """Convolutions, each with its norm."""
        norm = NORMS[self.norm]
        if self.expands:
            self.expand = conv(self.hidden, 1, lowering=self.lowering)
            self.expand_norm = norm(input_scale=self.scale, slope=0.0)
        self.depthwise = Depthwise(3, self.stride, fan_in_uniform, self.lowering)
        self.depthwise_norm = norm(input_scale=self.scale, slope=0.0)
        self.project = conv(self.out, 1, lowering=self.lowering)
        self.project_norm = norm(input_scale=self.scale)

    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Apply the block.

        Args:
          x: [B, H, W, I].
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B, H / stride, W / stride, out].
        """
        h = x
        if self.expands:
            h = _at_most_6(self.expand_norm(self.expand(h), train=train, mask=mask))
        h = self.depthwise_norm(self.depthwise(h), train=train, mask=mask)
        h = self.project(_at_most_6(h))
        h = self.project_norm(h, train=train, mask=mask)
        return h + x if self.residual else h


class MobileNetV2(nn.Module):
    """MobileNetV2 whose maps of 32 pixels end as 4 x 4, without its dropout.

    Attributes:
      num_classes: K, size of the output.
      width: 64 is the published network. Others have their channels in proportion, in
        multiples of 8; the last convolution never has fewer than 1280.
      stages: see `STAGES`.
      dtype: of activations; parameters, moments and logits are float32.
      lowering: of convolutions, one of `conv.LOWERINGS`.
      norm: a key of `norm.NORMS`.
      rate: fraction of the channels of every hidden layer that this network has.
      scale: factor of the convolutions' outputs in training.
    """

    num_classes: int
    width: int = 64
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    dtype: str = "float32"
    lowering: str = "auto"
    norm: str = "batch"
    rate: float = 1.0
    scale: float = 1.0

    def setup(self) -> None:
        """Stem, blocks, the last convolution, classifier."""
        kept = {name: submodel.kept(n, self.rate) for name, n in self.widths.items()}
        norm = NORMS[self.norm]
        self.stem = conv(kept["stem"], 3, lowering=self.lowering)
        self.stem_norm = norm(input_scale=self.scale, slope=0.0)
        self.blocks = {
            name: InvertedResidual(
                kept[hidden],
                kept[out],
                stride,
                expands=hidden != into,
                residual=into == out,
                lowering=self.lowering,
                norm=self.norm,
                scale=self.scale,
            )
            for name, into, hidden, out, stride in self._plan()
        }
        self.last = conv(kept["last"], 1, lowering=self.lowering)
        self.last_norm = norm(input_scale=self.scale, slope=0.0)
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Number of channels of each channel space at rate 1; see `submodel`.

        "stream1" and so on are those of the outputs of each stage's blocks, "BLOCK/1"
        lie within one block.
        """
        factor = self.width / 64
        widths = {"stem": rounded(_STEM * factor)}
        for number, (_, channels, _, _) in enumerate(self.stages, start=1):
            widths[f"stream{number}"] = rounded(channels * factor)
        for name, into, hidden, _, _ in self._plan():
            if hidden != into:
                times = self.stages[int(name.partition("_")[0]) - 1][0]
                widths[hidden] = times * widths[into]
        return widths | {"last": rounded(_LAST * max(1.0, factor))}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of the input and the output of each layer."""
        found: dict[str, tuple[str | None, str | None]] = {}

        def layer(name: str, into: str | None, out: str) -> None:
            found[name] = found[f"{name}_norm"] = (into, out)

        layer("stem", None, "stem")
        stream = "stem"
        for name, into, hidden, out, _ in self._plan():
            # flax calls a module in the dict `blocks` "blocks_" and its key.
            block = f"blocks_{name}"
            if hidden != into:
                layer(f"{block}/expand", into, hidden)
            layer(f"{block}/depthwise", None, hidden)
            layer(f"{block}/project", hidden, out)
            stream = out
        layer("last", stream, "last")
        return found | {"fc": ("last", submodel.CLASSES)}

    def _plan(self) -> list[tuple[str, str, str, str, int]]:
        """Name, channel spaces of input, inside and output, and stride of each block.

        Within a stage input and output are of one space: there the input is added.
        """
        found, into = [], "stem"
        for number, (times, _, count, stride) in enumerate(self.stages, start=1):
            for i in range(count):
                name, out = f"{number}_{i}", f"stream{number}"
                hidden = f"{name}/1" if times > 1 else into
                found.append((name, into, hidden, out, 1 if i else stride))
                into = out
        return found

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Pooled penultimate features.

        Args:
          x: normalised images [B, H, W, D] float32.
          train: whether batch-norm uses, and updates by, the moments of the batch.
          mask: [B] bool, False for images that do not count in them; None: all count.

        Returns:
          [B, F] float32.
        """
        x = self.stem(x.astype(self.dtype))
        x = _at_most_6(self.stem_norm(x, train=train, mask=mask))
        for block in self.blocks.values():
            x = block(x, train=train, mask=mask)
        x = _at_most_6(self.last_norm(self.last(x), train=train, mask=mask))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))


def _at_most_6(x: Array) -> Array:
    """What makes a ReLU, which the norms have, a ReLU6."""
    return jnp.minimum(x, 6)
