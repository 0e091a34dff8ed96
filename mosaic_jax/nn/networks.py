"""Networks of classifiers by name, and the settings of their shape."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

from mosaic_jax.core import errors, programs, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.nn import adapted, cnn, lenet, mlp, mobilenet, norm, resnet, vit

Module = nn.Module
MAX_WIDTH = 4096
# Fields of `build_classifier` that a network may lack, whatever they are.
_OPTIONAL = ("width", "lowering")


def _is_network(found: Any) -> bool:
    if isinstance(found, adapted.Handed):
        return True
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return False
    defined = {name for base in found.__mro__ for name in vars(base)}
    required = {
        one.name: one.default is one.default_factory is dataclasses.MISSING
        for one in schema.settings_of(found)
    }
    has_classes = required.pop("num_classes", None) is not None
    methods = {"features", "head", "__call__"}
    return has_classes and not any(required.values()) and methods <= defined


NETWORKS: Registry[Callable[..., Module]] = Registry(
    "model.name",
    {
        **{
            name: functools.partial(resnet.ResNet, depth=name) for name in resnet.DEPTHS
        },
        "mobilenetv2": mobilenet.MobileNetV2,
        "vit": vit.ViT,
        "cnn": cnn.CNN,
        "fedavg_cnn": lenet.FedAvgCNN,
        "lenet5": lenet.LeNet5,
        "mlp": mlp.MLP,
    },
    schema.Allowed(
        "a flax.linen.Module with the field num_classes, defaults of all others, and"
        " the methods features, head and __call__",
        _is_network,
    ),
)


def _are_networks(value: tuple) -> bool:
    known = all(name in NETWORKS or ":" in str(name) for name in value)
    return known and len(set(value)) == len(value)


@dataclasses.dataclass(frozen=True)
class Model(schema.Group):
    """The classifier of server and clients, and further networks of clients."""

    name: str = schema.component(
        NETWORKS, default="resnet18", meaning="the network; ResNets have a CIFAR stem"
    )
    others: tuple = schema.field(
        (),
        f"different ones of {', '.join(NETWORKS)}",
        _are_networks,
        "further networks, dealt to the clients in turn with `name`",
    )
    start: str = schema.anything(
        default="",
        meaning="what `name` starts from: a finished run or its URL, RUN:MODEL, or a"
        " file of arrays, .pth or .safetensors; '': at random",
    )
    width: int = schema.between(
        1,
        MAX_WIDTH,
        default=64,
        meaning="channels of the first group of layers; networks that were published"
        " have their own numbers at 64, and in proportion else",
    )
    norm: str = schema.one_of(
        norm.NORMS,
        default="batch",
        meaning="of networks that have a choice; group and layer keep no statistics",
    )
    dtype: str = schema.one_of(
        ("auto", "float32", "bfloat16"),
        default="auto",
        meaning="of activations; auto: bfloat16 on accelerators, float32 on CPUs",
    )
    rate: float = schema.field(
        1.0,
        "in (0, 1]",
        lambda x: 0 < x <= 1,
        "share of the channels of every hidden layer",
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Networks must be different, and no more than there are clients."""
        if self.name in self.others:
            yield (
                f"model.others = {self.others}: must not have model.name ="
                f" {self.name!r} again"
            )
        if self.others and 1 + len(self.others) > study.data.num_clients:
            yield (
                f"model.others = {self.others}: must be fewer than data.num_clients ="
                f" {study.data.num_clients}"
            )


def with_dtype(model: Model) -> Model:
    """`model` with the type of activations that "auto" stands for on these devices.

    It is float32 where a network has no field `dtype`.
    """
    if model.dtype != "auto":
        return model
    is_cpu = programs.platform() == "cpu"
    takes = all("dtype" in _fields(name) for name in (model.name, *model.others))
    return dataclasses.replace(
        model, dtype="bfloat16" if takes and not is_cpu else "float32"
    )


def class_of(name: str) -> Any:
    """The class of the network called `name`; of one that was handed in, its wrapper.

    Raises:
      ConfigError: the network is unknown or cannot be imported.
    """
    network: Any = NETWORKS.find(name)
    return getattr(network, "func", network)


def _fields(name: str) -> set[str]:
    """Names of the fields of a network."""
    return {one.name for one in dataclasses.fields(class_of(name))}


def build_classifier(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    **fields: Any,
) -> Module:
    """The network called `name`, or a user's own module "package.module:Class".

    Args:
      name: of `NETWORKS`, or an import path.
      num_classes: K.
      image_shape: (H, W, D) of the images.
      fields: `width`, `dtype`, `lowering`, `norm` and `rate`; a module is given those
        of them that it declares.

    Raises:
      ConfigError: the network is unknown or cannot be imported, lacks a field that is
        set to something else than its default, or what the network always has, or
        cannot be adapted to such images.
    """
    network: Any = NETWORKS.find(name)
    own, defaults = _fields(name), schema.defaults(Model) | {"dtype": "float32"}
    always = defaults | getattr(class_of(name), "ALWAYS", {})
    lacking = [
        f"model.{key} = {value!r}: must be {always[key]!r} for the network"
        f" {name!r}, which has no field {key!r}"
        for key, value in fields.items()
        if key not in (*own, *_OPTIONAL) and value not in (defaults[key], always[key])
    ]
    if lacking:
        raise errors.ConfigError("\n".join(lacking))
    if isinstance(network, adapted.Handed):
        return network.build(num_classes, image_shape)
    fields = {key: value for key, value in fields.items() if key in own}
    return network(num_classes=num_classes, **fields)
