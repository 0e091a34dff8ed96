"""The methods that a study can be run with, each by one name."""

import copy
import operator
from collections.abc import Mapping
from typing import Any

from mosaic_jax.core import errors, registry, schema
from mosaic_jax.run import settings, variants
from mosaic_jax.run.settings import Settings
from mosaic_jax.server import METHODS
from mosaic_jax.server.base import ServerTraining

# The methods of `compare` = "all", in the order of tables.
COMPARED = (
    "fedavg",
    "fedavg_decay",
    "fedprox",
    "fedbn",
    "fedrs",
    "fedlc",
    "feddyn",
    "feddf",
    "dense",
    "coboosting",
    "fedgen",
    "fedftg",
    "dfrd",
    "mosaic",
)
# Those of "heterogeneous": clients hold networks of several sizes, by their budgets.
HETEROGENEOUS = (
    "fedavg@smallest",
    "fedavg",
    "fedavg_decay",
    "heterofl",
    "fedrolex",
    "feddropout",
    "dfrd+heterofl",
    "dfrd+fedrolex",
    "dfrd+feddropout",
    "mosaic+heterofl",
    "mosaic+fedrolex",
    "mosaic+feddropout",
)
# Those of "architectures": clients have networks of unlike kinds, by `model.others`.
ARCHITECTURES = ("fedproto", "fedtgp", "mosaic")
# Ends the name of a method whose last rounds have the learning rate of Mosaic's.
DECAY = "_decay"
# What a name says, and its value in a study of Mosaic.
_NAMED = {"method": "mosaic", "server.method": "none"}
LISTS = {
    "all": COMPARED,
    "heterogeneous": HETEROGENEOUS,
    "architectures": ARCHITECTURES,
}


def changes(study: Any, name: str) -> dict[str, Any]:
    """The settings in which method `name` differs from Mosaic on equal terms.

    Data, seed, model, local work and the total number of rounds stay the same. One-shot
    methods train on the server after as many rounds as Mosaic, and fine-tune after that
    as Mosaic does; their clients train by `init.method`, as Mosaic's. All others have
    the learning rate of the first rounds to the end, unless their name says otherwise.
    A name that is neither "mosaic" nor a server method's is taken for a federated
    algorithm's.

    Args:
      study: settings of a Mosaic study, or a ConfigDict of them.
      name: of the method, or "package.module:Class"; "mosaic:paper" and
        "mosaic:published" are Mosaic in the form of the paper or its code (see
        `variants`), "METHOD+ALGORITHM" trains the clients by a federated algorithm,
        "METHOD@smallest" gives everyone the network of the smallest budget,
        "METHOD_decay" trains the last rounds, as many as Mosaic's fine-tuning has, at
        its learning rate.

    Returns:
      New values of fields by dotted name.

    Raises:
      ConfigError: `study` is not one of Mosaic, an import path cannot be imported, or
        what stands after "@" or "mosaic:", or before "_decay" or "+", is another thing.
    """
    for field, usual in _NAMED.items():
        if (found := operator.attrgetter(field)(study)) != usual:
            raise errors.ConfigError(
                f"{field} = {found!r}: must be {usual!r} where a method is named,"
                f" {name!r}: its name says by what it differs from Mosaic"
            )
    told, (name, _, algorithm) = name, name.partition("+")
    name, _, size = name.partition("@")
    decays, name = name.endswith(DECAY), name.removesuffix(DECAY)
    result: dict[str, Any] = {}
    if algorithm:
        result["init.method"] = algorithm
    if size not in ("", "smallest"):
        raise errors.ConfigError(
            f"compare = {told!r}: '@{size}' must be '@smallest', at the end of a"
            " method's name"
        )
    if size:
        result["model.rate"] = float(min(study.budgets.rates))
    form = form_of(name)
    is_mosaic = name == "mosaic" or form
    method = None if is_mosaic else _server_method(name)
    once = is_mosaic or (method is not None and method.when == "once")
    if once and decays:
        raise errors.ConfigError(
            f"compare = {told!r}: must be without {DECAY!r}: the last rounds of"
            f" {name!r} have Mosaic's learning rate anyway"
        )
    if algorithm and not is_mosaic and method is None:
        raise errors.ConfigError(
            f"compare = {told!r}: '+{algorithm}' must stand after mosaic or a method on"
            f" the server, not after {name!r}, by which clients train"
        )
    if is_mosaic:
        return result | (variants.changes(study, form) if form else {})
    result["method"] = "federated"
    if method is None:
        result["init.method"] = name
    else:
        result |= {"server.method": name, "server.when": method.when}
    if not decays and not once:
        result["warmup.rounds"] = study.warmup.rounds + study.finetune.rounds
        result["finetune.rounds"] = 0
    return result


def form_of(name: str) -> str:
    """The form that a name of Mosaic says: "paper" of "mosaic:paper", else ""."""
    name, _, form = name.partition(":")
    return form if name == "mosaic" else ""


def choose(config: Any, name: str) -> None:
    """Change the ConfigDict of a Mosaic study into that of method `name`, in place."""
    config.update_from_flattened_dict(changes(config, name))


def with_method(study: Settings, name: str) -> Settings:
    """The settings of method `name`, on equal terms with the Mosaic study `study`.

    Raises:
      ConfigError: the method is not known, or cannot be run in this study.
    """
    mapping = schema.to_mapping(study)
    return settings.from_mapping(changed(mapping, changes(study, name)))


def changed(mapping: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping, with new `values` of fields by dotted name."""
    result = copy.deepcopy(dict(mapping))
    for field, value in values.items():
        *groups, last = field.split(".")
        group = result
        for name in groups:
            group = group[name]
        group[last] = value
    return result


def _server_method(name: str) -> type[ServerTraining] | None:
    """The server method called `name`, or at that import path; None: there is none."""
    if ":" not in name:
        return METHODS.get(name)
    component = registry.load(name, "compare")
    if isinstance(component, type) and issubclass(component, ServerTraining):
        return component
    return None
