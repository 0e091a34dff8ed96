"""Conversion between this library's networks and the published PyTorch state dicts.

One table per network lists which array here corresponds to which there; both
directions use it. A state dict is a mapping from names to arrays or tensors; PyTorch is
needed only to read `.pth` files. Layouts: convolutions are (out, in, kh, kw) there and
(kh, kw, in, out) here, transposed ones (in, out, kh, kw) and (kh, kw, out, in), linear
layers (out, in) and (in, out).
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.nn import dcgan, meta, networks, resnet

NETWORKS = (*resnet.DEPTHS, "generator", "discriminator", "meta")
# Entries of the published files that the networks do not use.
UNUSED = ("attention_weights", "diag_weights")

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One array: `path` in our variables, `name` in a state dict.

    `kind` tells how its axes are permuted; `part` which of three arrays it is that a
    state dict has concatenated.
    """

    path: tuple[str, ...]
    name: str
    kind: str
    part: int | None = None

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        if self.part is not None:
            array = np.split(array, 3)[self.part]
        return array.transpose(_AXES[self.kind][0]) if self.kind in _AXES else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = array.transpose(_AXES[self.kind][1]) if self.kind in _AXES else array
        return np.ascontiguousarray(array)


# Kind to the order of axes on the way in, and on the way out.
_AXES = {"conv": ((2, 3, 1, 0), (3, 2, 0, 1)), "linear": ((1, 0), (1, 0))}


def load(
    network: str,
    state_dict: Mapping[str, Any] | str | pathlib.Path,
    num_classes: int = 10,
) -> tuple[networks.Module, Variables]:
    """Create a flax module and its variables from a published state dict.

    Args:
      network: one of `NETWORKS`.
      state_dict: names to arrays, or a `.pth` file, read with `weights_only=True`.
      num_classes: K, of a classifier or meta head.

    Returns:
      `(module, variables)` for `module.apply(variables, x, train=False)`, where x are
      images [B, H, W, D], noise [B, nz] or expert logits [B, E, K].

    Raises:
      CheckpointError: an entry is missing or unknown, or the number of classes differs.
      ConfigError: `network` is unknown.
    """
    if network not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise errors.ConfigError(f"network = {network!r}: must be one of {known}")
    arrays = _read(state_dict)
    for name in ("linear.bias", "fc.bias"):  # last layer of classifier, meta head
        if name in arrays and len(arrays[name]) != num_classes:
            raise errors.CheckpointError(
                f"{network}: {name} has {len(arrays[name])} classes: must be"
                f" num_classes = {num_classes}"
            )
    num_convs = sum(array.ndim == 4 for array in arrays.values())
    table = _table(network, num_convs)
    known_names = {entry.name for entry in table}
    for name in sorted(known_names - arrays.keys()):
        raise errors.CheckpointError(f"{network}: entry {name!r} is missing")
    for name in arrays.keys() - known_names:
        if not name.endswith(("num_batches_tracked", *UNUSED)):
            raise errors.CheckpointError(f"{network}: unknown entry {name!r}")
    flat = {entry.path: entry.to_jax(arrays[entry.name]) for entry in table}
    module = _module(network, arrays, num_convs, num_classes)
    return module, flax.traverse_util.unflatten_dict(flat)


def save(network: str, variables: Variables) -> dict[str, np.ndarray]:
    """The state dict of `variables` with the published names; inverse of `load`."""
    flat: Any = flax.traverse_util.flatten_dict(variables)
    num_convs = sum(np.ndim(array) == 4 for array in flat.values())
    result: dict[str, np.ndarray] = {}
    for entry in _table(network, num_convs):
        array = entry.to_torch(np.asarray(flat[entry.path]))
        if entry.part:  # follows part 0 in the table
            array = np.concatenate([result[entry.name], array])
        result[entry.name] = array
        if entry.name.endswith("running_var"):
            scope = entry.name.removesuffix("running_var")
            result[f"{scope}num_batches_tracked"] = np.zeros((), np.int64)
    return result


def _read(state_dict: Mapping[str, Any] | str | pathlib.Path) -> dict[str, np.ndarray]:
    arrays: Any = state_dict
    if isinstance(state_dict, (str, pathlib.Path)):
        # PyTorch is optional.
        torch = importlib.import_module("torch")
        arrays = torch.load(state_dict, map_location="cpu", weights_only=True)
    return {name: np.asarray(value) for name, value in arrays.items()}


def _module(
    network: str, arrays: dict[str, np.ndarray], num_convs: int, num_classes: int
) -> networks.Module:
    if network in resnet.DEPTHS:
        return resnet.ResNet(num_classes, network, arrays["conv1.weight"].shape[0])
    if network == "meta":
        return meta.TransformerHead(num_classes)
    # Both have one convolution per doubling from 4 pixels to the image, and two more.
    image_size = 4 * 2 ** (num_convs - 2)
    if network == "generator":
        last = arrays[f"main.{3 * (num_convs - 1)}.weight"]
        return dcgan.Generator(image_size, channels=last.shape[1], width=last.shape[0])
    return dcgan.Discriminator(image_size, arrays["main.0.weight"].shape[0])


def _table(network: str, num_convs: int) -> list[_Entry]:
    tables: dict[str, Callable[[int], list[_Entry]]] = {
        "generator": _generator,
        "discriminator": _discriminator,
        "meta": lambda _: _meta(),
    }
    if network in resnet.DEPTHS:
        return _resnet(network)
    return tables[network](num_convs)


def _conv(path: str, name: str) -> list[_Entry]:
    return [_Entry(("params", *path.split("/"), "kernel"), f"{name}.weight", "conv")]


def _linear(path: str, name: str) -> list[_Entry]:
    ours = ("params", *path.split("/"))
    return [
        _Entry((*ours, "kernel"), f"{name}.weight", "linear"),
        _Entry((*ours, "bias"), f"{name}.bias", "same"),
    ]


def _norm(path: str, name: str, *, running: bool = True) -> list[_Entry]:
    scope = tuple(path.split("/"))
    pairs = [("params", "scale", "weight"), ("params", "bias", "bias")]
    if running:
        pairs += [
            ("batch_stats", "mean", "running_mean"),
            ("batch_stats", "var", "running_var"),
        ]
    return [
        _Entry((collection, *scope, ours), f"{name}.{theirs}", "same")
        for collection, ours, theirs in pairs
    ]


def _resnet(network: str) -> list[_Entry]:
    kind, counts = resnet.DEPTHS[network]
    num_convs = 3 if kind == "bottleneck" else 2
    table = _conv("conv1", "conv1") + _norm("bn1", "bn1")
    for group, count in enumerate(counts, start=1):
        for block in range(count):
            ours, theirs = f"blocks_layer{group}_{block}", f"layer{group}.{block}"
            for i in range(1, num_convs + 1):
                table += _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
                table += _norm(f"{ours}/bn{i}", f"{theirs}.bn{i}")
            # A basic block keeps its width in the first group.
            if block == 0 and (group > 1 or kind == "bottleneck"):
                table += _conv(f"{ours}/shortcut_conv", f"{theirs}.shortcut.0")
                table += _norm(f"{ours}/shortcut_bn", f"{theirs}.shortcut.1")
    return table + _linear("fc", "linear")


def _generator(num_convs: int) -> list[_Entry]:
    """Convolution, norm and ReLU, repeated; then a convolution alone."""
    table = []
    for i in range(num_convs - 1):
        table += _conv(f"convs_{i}", f"main.{3 * i}")
        table += _norm(f"norms_{i}", f"main.{3 * i + 1}")
    return table + _conv("out", f"main.{3 * (num_convs - 1)}")


def _discriminator(num_convs: int) -> list[_Entry]:
    """The first and the last convolution have no norm; leaky ReLUs after all but it."""
    table = _conv("convs_0", "main.0")
    for i in range(1, num_convs - 1):
        table += _conv(f"convs_{i}", f"main.{3 * i - 1}")
        table += _norm(f"norms_{i - 1}", f"main.{3 * i}")
    return table + _conv("out", f"main.{3 * (num_convs - 1) - 1}")


def _meta() -> list[_Entry]:
    table = _linear("fc_expand", "fc_expand") + _linear("fc", "fc")
    for stack, num_norms in (("encoder", 2), ("decoder", 3)):
        prefix = f"transformer.{stack}"
        layer = f"{prefix}.layers.0"
        table += _attention(f"{stack}/self_attn", f"{layer}.self_attn")
        if stack == "decoder":
            table += _attention(f"{stack}/multihead_attn", f"{layer}.multihead_attn")
        for i in (1, 2):
            table += _linear(f"{stack}/linear{i}", f"{layer}.linear{i}")
        for i in range(1, num_norms + 1):
            table += _norm(f"{stack}/norm{i}", f"{layer}.norm{i}", running=False)
        table += _norm(f"{stack}_norm", f"{prefix}.norm", running=False)
    return table


def _attention(path: str, name: str) -> list[_Entry]:
    """A state dict has query, key and value concatenated in one array."""
    ours = ("params", *path.split("/"))
    table = []
    for part, role in enumerate(("query", "key", "value")):
        weight, bias = f"{name}.in_proj_weight", f"{name}.in_proj_bias"
        table.append(_Entry((*ours, f"{role}_kernel"), weight, "linear", part))
        table.append(_Entry((*ours, f"{role}_bias"), bias, "same", part))
    return table + _linear(f"{path}/out", f"{name}.out_proj")
