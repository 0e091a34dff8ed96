"""Names and axes of arrays in PyTorch's state dicts, of each network.

A table lists which array here corresponds to which there; both directions use it.
Layouts: convolutions are (out, in, kh, kw) there and (kh, kw, in, out) here, transposed
ones (in, out, kh, kw) and (kh, kw, out, in), linear layers (out, in) and (in, out),
those of a whole map (out, in kh kw) and (kh, kw, in, out).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from mosaic_jax.nn import resnet
from mosaic_jax.nn.lenet import FedAvgCNN, LeNet5

Path = tuple[str, ...]
# Kind to the order of axes on the way in, and on the way out.
_AXES = {"conv": ((2, 3, 1, 0), (3, 2, 0, 1)), "linear": ((1, 0), (1, 0))}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: `path` in our variables, `name` in a state dict.

    `kind` tells how its axes are permuted; `part` which of three arrays it is that a
    state dict has concatenated.
    """

    path: Path
    name: str
    kind: str
    part: int | None = None

    def to_jax(self, array: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
        """The array as it is here; `shape` is needed of a layer of a whole map."""
        if self.part is not None:
            array = np.split(array, 3)[self.part]
        if self.kind == "map":
            rows, columns, depth, out = shape
            array = array.reshape(out, depth, rows, columns)
        return array.transpose(_AXES[self._axes][0]) if self._axes in _AXES else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The array as a state dict has it."""
        array = array.transpose(_AXES[self._axes][1]) if self._axes in _AXES else array
        if self.kind == "map":
            array = array.reshape(len(array), -1)
        return np.ascontiguousarray(array)

    @property
    def _axes(self) -> str:
        return "conv" if self.kind == "map" else self.kind


Table = list[Entry]


def layouts(network: str, shapes: Mapping[Path, Any]) -> list[Table]:
    """The tables of a network; the first one is used where a state dict is written.

    Args:
      network: its name; the last table, names as here, is that of any network.
      shapes: its variables, or only their shapes, by path.
    """
    found: list[Table] = []
    if network in resnet.DEPTHS:
        published = resnets(network, "shortcut", "linear")
        found = [published, resnets(network, "downsample", "fc")]
    elif network in _TABLES:
        found = [_TABLES[network](shapes)]
    # Only batch-norm has statistics.
    found = [[entry for entry in table if entry.path in shapes] for table in found]
    return [*found, [Entry(path, "/".join(path), "same") for path in shapes]]


def conv(path: str, name: str) -> Table:
    """A convolution without bias."""
    return [Entry(("params", *path.split("/"), "kernel"), f"{name}.weight", "conv")]


def linear(path: str, name: str, kind: str = "linear") -> Table:
    """A layer with bias.

    Args:
      path: of the layer here.
      name: of the layer there.
      kind: of its kernel.
    """
    ours = ("params", *path.split("/"))
    return [
        Entry((*ours, "kernel"), f"{name}.weight", kind),
        Entry((*ours, "bias"), f"{name}.bias", "same"),
    ]


def norm(path: str, name: str, *, running: bool = True) -> Table:
    """A norm.

    Args:
      path: of the layer here.
      name: of the layer there.
      running: whether it has running statistics.
    """
    scope = tuple(path.split("/"))
    pairs = [("params", "scale", "weight"), ("params", "bias", "bias")]
    if running:
        pairs += [
            ("batch_stats", "mean", "running_mean"),
            ("batch_stats", "var", "running_var"),
        ]
    return [
        Entry((collection, *scope, ours), f"{name}.{theirs}", "same")
        for collection, ours, theirs in pairs
    ]


def resnets(network: str, shortcut: str, head: str) -> Table:
    """A ResNet.

    Args:
      network: a key of `resnet.DEPTHS`.
      shortcut: what a projecting shortcut is called there.
      head: what the last layer is called there.
    """
    kind, counts = resnet.DEPTHS[network]
    num_convs = 3 if kind == "bottleneck" else 2
    table = conv("conv1", "conv1") + norm("bn1", "bn1")
    for group, count in enumerate(counts, start=1):
        for block in range(count):
            ours, theirs = f"blocks_layer{group}_{block}", f"layer{group}.{block}"
            for i in range(1, num_convs + 1):
                table += conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
                table += norm(f"{ours}/bn{i}", f"{theirs}.bn{i}")
            # A basic block keeps its width in the first group.
            if block == 0 and (group > 1 or kind == "bottleneck"):
                table += conv(f"{ours}/shortcut_conv", f"{theirs}.{shortcut}.0")
                table += norm(f"{ours}/shortcut_bn", f"{theirs}.{shortcut}.1")
    return table + linear("fc", head)


def _mobilenet(shapes: Mapping[Path, Any]) -> Table:
    """As torchvision names it."""

    def layer(path: str, theirs: str, index: int) -> Table:
        """A convolution and its norm, one after the other in a list of layers."""
        found = conv(path, f"{theirs}.{index}")
        return found + norm(f"{path}_norm", f"{theirs}.{index + 1}")

    table = layer("stem", "features.0", 0)
    blocks = [name for name in _modules(shapes) if name.startswith("blocks_")]
    blocks.sort(key=lambda name: [int(part) for part in name.split("_")[1:]])
    for number, block in enumerate(blocks, start=1):
        theirs, index = f"features.{number}.conv", 0
        if ("params", block, "expand", "kernel") in shapes:
            table += layer(f"{block}/expand", f"{theirs}.0", 0)
            index = 1
        table += layer(f"{block}/depthwise", f"{theirs}.{index}", 0)
        table += layer(f"{block}/project", theirs, index + 1)
    table += layer("last", f"features.{len(blocks) + 1}", 0)
    return table + linear("fc", "classifier.1")


def _vit(shapes: Mapping[Path, Any]) -> Table:
    """As timm names it."""
    table = linear("embedding", "patch_embed.proj", "conv")
    for ours, theirs in (("class_token", "cls_token"), ("position", "pos_embed")):
        table.append(Entry(("params", "embedding", ours), theirs, "same"))
    for block in sorted(_modules(shapes)):
        if block.startswith("blocks_"):
            theirs = block.replace("_", ".")
            for i in (1, 2):
                table += norm(f"{block}/norm{i}", f"{theirs}.norm{i}")
                table += linear(f"{block}/fc{i}", f"{theirs}.mlp.fc{i}")
            table += linear(f"{block}/qkv", f"{theirs}.attn.qkv")
            table += linear(f"{block}/out", f"{theirs}.attn.proj")
    return table + norm("norm_out", "norm") + linear("fc", "head")


def _cnn(shapes: Mapping[Path, Any]) -> Table:
    table: Table = []
    for i in range(sum(name.startswith("convs_") for name in _modules(shapes))):
        table += conv(f"convs_{i}", f"convs.{i}") + norm(f"norms_{i}", f"norms.{i}")
    return table + linear("fc", "fc")


def _mlp(shapes: Mapping[Path, Any]) -> Table:
    table: Table = []
    for i in range(sum(name.startswith("hidden_") for name in _modules(shapes))):
        table += linear(f"hidden_{i}", f"hidden.{i}")
    return table + linear("fc", "fc")


def _lenet(network: type[LeNet5]) -> Callable[[Mapping[Path, Any]], Table]:
    def table(shapes: Mapping[Path, Any]) -> Table:
        del shapes
        kinds = ["conv"] * len(network.MAPS) + ["map"] * len(network.UNITS)
        found: Table = []
        for i, kind in enumerate(kinds):
            found += linear(f"layers_{i}", f"layers.{i}", kind)
        return found + linear("fc", "fc")

    return table


_TABLES: Mapping[str, Callable[[Mapping[Path, Any]], Table]] = {
    "mobilenetv2": _mobilenet,
    "vit": _vit,
    "cnn": _cnn,
    "mlp": _mlp,
    "lenet5": _lenet(LeNet5),
    "fedavg_cnn": _lenet(FedAvgCNN),
}


def _modules(shapes: Collection[Path]) -> set[str]:
    """Names of the outermost modules that have parameters."""
    return {path[1] for path in shapes if path[0] == "params"}
