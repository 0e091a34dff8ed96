"""Objects that a user hands in, as the settings name them.

A class or function gets an import path that means it in this process; the fields of an
instance become the settings of its class. So a study of objects is like any other: its
settings tell all about it, and its stages are found again by the same fingerprints.
"""

import threading
from collections.abc import Callable
from typing import Any, cast

from flax import nnx

from mosaic_jax.core import errors, registry, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.data import flower
from mosaic_jax.data.dataset import Arrays
from mosaic_jax.data.partition import MODES
from mosaic_jax.data.sources import SOURCES, Source
from mosaic_jax.nn.adapted import Handed
from mosaic_jax.nn.networks import NETWORKS, Module
from mosaic_jax.run.settings import Settings

# Objects are handed in by name, so one study after the other is put together.
PUTTING_TOGETHER = threading.Lock()
# What the data set of a user's arrays is called.
OWN_DATA = "own:arrays"


def component(argument: str, kinds: Registry[Any], given: Any) -> dict[str, Any]:
    """The settings of an algorithm or a method on the server.

    Args:
      argument: of `Study`, for messages.
      kinds: the registry of such components.
      given: a name, a class, or an instance of one.

    Returns:
      New values of fields by dotted name.

    Raises:
      ConfigError: it is of another kind.
    """
    if isinstance(given, str):
        return {kinds.field: given}
    cls = given if isinstance(given, type) else type(given)
    if not kinds.kind.test(cls):
        raise errors.ConfigError(
            f"{argument} = {given!r}: must be a name, {kinds.kind.phrase}, or an"
            " instance of one"
        )
    known = [name for name, one in kinds.items() if one is cls]
    name = known[0] if known else registry.hand(cls)
    values: dict[str, Any] = {kinds.field: name}
    if given is not cls:
        group = registry.group_of(name, cls)
        for one in schema.settings_of(cls):
            values[f"methods.{group}.{one.name}"] = getattr(given, one.name)
    return values


def network(given: Any) -> dict[str, Any]:
    """The settings of a network.

    Args:
      given: a name, a class as the registry knows them, any flax.linen module, or what
        `nnx.bridge.to_linen` makes of one of flax.nnx.

    Raises:
      ConfigError: it is of another kind.
    """
    if isinstance(given, str):
        return {"model.name": given}
    if isinstance(given, nnx.Module):
        name = type(given).__name__
        raise errors.ConfigError(
            f"model = {name}: has its values already: must say how it is made, as"
            f" nnx.bridge.to_linen({name}, ...) does"
        )
    if isinstance(given, Module):
        path = f"{registry.place(type(given))}()"
        return {"model.name": registry.hand(Handed(given), path)}
    if not NETWORKS.kind.test(given):
        raise errors.ConfigError(
            f"model = {given!r}: must be a name, an instance of a flax.linen.Module,"
            f" or {NETWORKS.kind.phrase}"
        )
    return {"model.name": registry.hand(given)}


def data_set(given: Any) -> dict[str, Any]:
    """The settings of a data set.

    Args:
      given: a name, `Arrays`, or a function from a folder to `Arrays`.

    Raises:
      ConfigError: it is of another kind.
    """
    if isinstance(given, str):
        return {"data.name": given}
    if isinstance(given, Arrays):
        source = Source(None, lambda _: given, needs_files=False)
        return {"data.name": registry.hand(source, OWN_DATA)}
    return {"data.name": _function("data", SOURCES, given)}


def partition(given: Any) -> dict[str, Any]:
    """The settings of a split.

    Args:
      given: a name, a function as `partition.split` takes it, or a partitioner of
        flwr-datasets.

    Raises:
      ConfigError: it is of another kind.
    """
    if isinstance(given, str):
        return {"data.split": given}
    if flower.is_partitioner(given):
        path = f"{registry.place(type(given))}()"
        return {"data.split": registry.hand(flower.of_partitioner(given), path)}
    return {"data.split": _function("partition", MODES, given)}


def _function(argument: str, kinds: Registry[Any], given: Any) -> str:
    if not (isinstance(given, Callable) and kinds.kind.test(given)):
        raise errors.ConfigError(
            f"{argument} = {given!r}: must be a name or {kinds.kind.phrase}"
        )
    if not hasattr(given, "__qualname__"):
        raise errors.ConfigError(
            f"{argument} = {given!r}: has no name that the settings could hold: must be"
            " a function by `def` or `lambda`, which may call it"
        )
    return registry.hand(given)


def changed(mapping: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A nested mapping with new `values` by dotted name; missing groups are made.

    Raises:
      ConfigError: a value stands where a group must be.
    """
    result = {**mapping}
    for field, value in values.items():
        *groups, last = field.split(".")
        group = result
        for name in groups:
            try:
                group[name] = {**(group.get(name) or {})}
            except TypeError as error:
                raise errors.ConfigError(
                    f"{name} = {group[name]!r}: must be a dict of fields, as {field} is"
                    " one of them"
                ) from error
            group = group[name]
        group[last] = value
    return result


def as_mapping(config: Any) -> dict[str, Any]:
    """`Settings`, a ConfigDict or a dict as nested plain dicts.

    Raises:
      ConfigError: it is something else.
    """
    if isinstance(config, Settings):
        return schema.to_mapping(config)
    if isinstance(config, dict):
        return config
    if callable(to_dict := getattr(config, "to_dict", None)):
        return cast(dict[str, Any], to_dict())
    raise errors.ConfigError(
        f"config = {config!r}: must be the name of a configuration, a ConfigDict or a"
        " dict"
    )
