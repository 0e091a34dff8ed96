"""Configuration files: by their path, or by name those that come with the library."""

import importlib.machinery
import pathlib
import sys
import types
from typing import Any

from mosaic_jax import configs
from mosaic_jax.core import errors


def find(argument: str) -> str:
    """PATH.py[:VARIANT] of such, or of NAME[:VARIANT], a configuration of the library.

    Raises:
      ConfigError: there is no such file.
    """
    path, *variant = argument.split(":", 1)
    if pathlib.Path(path).is_file():
        return argument
    known = configs.shipped()
    if path in known:
        return ":".join([str(known[path]), *variant])
    raise errors.ConfigError(
        f"--config = {path!r}: must be a file, such as configs/digits_mosaic.py, or one"
        f" of {', '.join(known)}"
    )


def load(argument: str) -> Any:
    """The ConfigDict of what `find` finds.

    Modules that lie beside the file can be imported from then on, by the file and as
    the user's own components, whatever the current folder is.

    Raises:
      ConfigError: there is no such file, or it raises something, or its `get_config`
        is missing or does.
    """
    path, _, variant = find(argument).partition(":")
    if (folder := str(pathlib.Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    module = types.ModuleType("config_file")
    module.__file__ = path
    try:
        loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
        config.to_dict()  # whatever it is, it is a ConfigDict
        return config
    # Configs are Python and may raise anything.
    except (Exception, SystemExit) as error:
        raise errors.ConfigError(
            f"--config = {argument!r}: {type(error).__name__}: {errors.reason(error)}"
        ) from error
