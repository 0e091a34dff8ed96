"""The configurations that come with the library, as `mosaic_jax.configs.digits_mosaic`.

In a clone they lie in its folder `configs/`; an installed library has them here.
"""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from mosaic_jax.core import errors, schema

_CLONE = pathlib.Path(__file__).parents[2] / "configs"
if (_CLONE / "base.py").is_file():
    __path__.append(str(_CLONE))

# Not to be run themselves.
_SHARED = ("__init__", "base")


def shipped() -> dict[str, pathlib.Path]:
    """The library's configuration files by name, in alphabetical order."""
    found = {
        path.stem: path
        for folder in __path__
        for path in pathlib.Path(folder).glob("*.py")
        if path.stem not in _SHARED
    }
    return dict(sorted(found.items()))


def get(name: str, **overrides: Any) -> Any:
    """A configuration that comes with the library.

    Args:
      name: NAME or NAME:VARIANT; `mosaic list configs` prints them.
      overrides: new values of fields, of a group as a mapping:
        `get("digits_mosaic", seed=1, init={"rounds": 10})`.

    Returns:
      A ConfigDict of nested settings, which may be changed: `config.init.rounds = 10`.

    Raises:
      ConfigError: there is no such configuration.
    """
    file, _, variant = name.partition(":")
    if file not in shipped():
        raise errors.ConfigError(
            f"config = {name!r}: {schema.near(file, list(shipped()))}"
        )
    module = importlib.import_module(f"{__name__}.{file}")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except (ValueError, TypeError) as error:  # no such variant, or there are none
        raise errors.ConfigError(f"config = {name!r}: {errors.reason(error)}") from None
    return type(config)(_merged(config.to_dict(), overrides))


def _merged(mapping: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping, with the values of another one."""
    result = dict(mapping)
    for name, value in new.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[name] = value
    return result
