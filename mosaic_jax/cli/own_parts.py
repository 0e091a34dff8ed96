"""Settings of a user's own components, for the command line and for sweeps.

A configuration need not list them: those of every component that it, or the command
line, names by its import path are put into `config.methods` with their defaults.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from mosaic_jax.core import errors, registry, schema
from mosaic_jax.run import methods, settings

# Fields that name components whose settings are in `config.methods`.
FIELDS = (*(kinds.field for kinds in settings.COMPONENTS), "stages", "compare")
# "package.module:Class", also within a tuple, or a list by comma.
_PATH = re.compile(r"[^\s,+'\"()\[\]]+:\w+")

# A field's dotted name, and its value as text.
Named = tuple[str, str]


def on_command_line(words: Sequence[str]) -> Iterator[Named]:
    """Those of `FIELDS` that flags such as --config.init.method=VALUE set."""
    for word, after in itertools.pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").removeprefix("config.")
        if flag.startswith("-") and name in FIELDS:
            yield name, value if equals else after


def add_defaults(config: config_dict.ConfigDict, named: Iterable[Named]) -> set[str]:
    """Complete `config.methods` by the defaults of the user's own components, in place.

    Args:
      config: of a study.
      named: further values of fields, of the command line or of a grid; only `FIELDS`
        count.

    Returns:
      The groups of these components in `config.methods`, see `unused`.

    Raises:
      ConfigError: a component cannot be imported, one of its fields has no default, or
        the configuration has a value of another type.
    """
    found = _components([*_of_config(config.to_dict()), *named])
    with config.unlocked():
        if "methods" not in config:
            config.methods = config_dict.ConfigDict()
        methods: Any = config.methods
        for group, component in found.items():
            fields = config_dict.ConfigDict(schema.defaults(component))
            try:
                fields.update(methods.get(group, {}))
            except (TypeError, ValueError, AttributeError) as error:
                raise errors.ConfigError(
                    f"config.methods.{group}: {errors.reason(error)}"
                ) from error
            methods[group] = fields
    return found.keys() - settings.components().keys()


def unused(config: Mapping[str, Any], own: Collection[str]) -> set[str]:
    """Which of the groups `own` in "methods" are of components that a study lacks.

    They would be unknown to it, so they are left out of its settings.

    Raises:
      ConfigError: a component of the study cannot be imported.
    """
    return set(own) - _components(_of_config(config)).keys()


def _of_config(config: Mapping[str, Any]) -> Iterator[Named]:
    for field in FIELDS:
        value: Any = config
        for name in field.split("."):
            value = value.get(name, "") if isinstance(value, Mapping) else ""
        yield field, str(value)


def _components(named: Iterable[Named]) -> dict[str, type]:
    """The components at the import paths in `named`, by their group in `methods`.

    What is no component is left out: it is told when the study is built.
    """
    result: dict[str, type] = {}
    for field, value in named:
        for path in _PATH.findall(value) if field in FIELDS else ():
            if methods.form_of(path):  # no import path, for all its colon
                continue
            component = registry.load(path, field)
            if isinstance(component, type) and dataclasses.is_dataclass(component):
                registry.add(result, path, component)
    return result
