"""Conversion between this library's networks and PyTorch's state dicts.

One table per network lists which array here corresponds to which there, those of
classifiers in `nn.state_dicts`; both directions use it. A state dict is a mapping from
names to arrays or tensors; PyTorch is not needed.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from mosaic_jax.core import errors, tensor_files
from mosaic_jax.nn import dcgan, meta, networks, resnet, state_dicts
from mosaic_jax.nn.state_dicts import Entry, Table, conv, linear, norm

NETWORKS = (*resnet.DEPTHS, "generator", "discriminator", "meta")
# Entries of the published files that the networks do not use.
UNUSED = ("attention_weights", "diag_weights")

Variables = dict[str, Any]


def load(
    network: str,
    state_dict: Mapping[str, Any] | str | pathlib.Path,
    num_classes: int = 10,
) -> tuple[networks.Module, Variables]:
    """Create a flax module and its variables from a published state dict.

    Args:
      network: one of `NETWORKS`.
      state_dict: names to arrays, or a `.pth` or `.safetensors` file.
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
    """The state dict of `variables`; inverse of `load`, and of `model.start`.

    Args:
      network: a classifier, or one of `NETWORKS`.
      variables: of it, also with another width than it was published with.

    Returns:
      Arrays by name, as torchvision names those of MobileNetV2 and timm those of a ViT.

    Raises:
      ConfigError: `network` is unknown.
    """
    if network not in (*networks.NETWORKS, *NETWORKS):
        known = ", ".join(dict.fromkeys((*networks.NETWORKS, *NETWORKS)))
        raise errors.ConfigError(f"network = {network!r}: must be one of {known}")
    flat: Any = flax.traverse_util.flatten_dict(variables)
    if network in networks.NETWORKS:
        table = state_dicts.layouts(network, flat)[0]
    else:
        table = _table(network, sum(np.ndim(array) == 4 for array in flat.values()))
    result: dict[str, np.ndarray] = {}
    for entry in table:
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
        arrays = tensor_files.read(pathlib.Path(state_dict))
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


def _table(network: str, num_convs: int) -> Table:
    tables: dict[str, Callable[[int], Table]] = {
        "generator": _generator,
        "discriminator": _discriminator,
        "meta": lambda _: _meta(),
    }
    if network in resnet.DEPTHS:
        return state_dicts.resnets(network, "shortcut", "linear")
    return tables[network](num_convs)


def _generator(num_convs: int) -> Table:
    """Convolution, norm and ReLU, repeated; then a convolution alone."""
    table = []
    for i in range(num_convs - 1):
        table += conv(f"convs_{i}", f"main.{3 * i}")
        table += norm(f"norms_{i}", f"main.{3 * i + 1}")
    return table + conv("out", f"main.{3 * (num_convs - 1)}")


def _discriminator(num_convs: int) -> Table:
    """The first and the last convolution have no norm; leaky ReLUs after all but it."""
    table = conv("convs_0", "main.0")
    for i in range(1, num_convs - 1):
        table += conv(f"convs_{i}", f"main.{3 * i - 1}")
        table += norm(f"norms_{i - 1}", f"main.{3 * i}")
    return table + conv("out", f"main.{3 * (num_convs - 1) - 1}")


def _meta() -> Table:
    table = linear("fc_expand", "fc_expand") + linear("fc", "fc")
    for stack, num_norms in (("encoder", 2), ("decoder", 3)):
        prefix = f"transformer.{stack}"
        layer = f"{prefix}.layers.0"
        table += _attention(f"{stack}/self_attn", f"{layer}.self_attn")
        if stack == "decoder":
            table += _attention(f"{stack}/multihead_attn", f"{layer}.multihead_attn")
        for i in (1, 2):
            table += linear(f"{stack}/linear{i}", f"{layer}.linear{i}")
        for i in range(1, num_norms + 1):
            table += norm(f"{stack}/norm{i}", f"{layer}.norm{i}", running=False)
        table += norm(f"{stack}_norm", f"{prefix}.norm", running=False)
    return table


def _attention(path: str, name: str) -> Table:
    """A state dict has query, key and value concatenated in one array."""
    ours = ("params", *path.split("/"))
    table = []
    for part, role in enumerate(("query", "key", "value")):
        weight, bias = f"{name}.in_proj_weight", f"{name}.in_proj_bias"
        table.append(Entry((*ours, f"{role}_kernel"), weight, "linear", part))
        table.append(Entry((*ours, f"{role}_bias"), bias, "same", part))
    return table + linear(f"{path}/out", f"{name}.out_proj")
