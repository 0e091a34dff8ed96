"""Modules by name, as their files are: none is run for it."""

import importlib.machinery
import importlib.util
import sys
import types


def find(name: str) -> types.ModuleType | None:
    """The module called `name`, which is not run if nothing has imported it yet.

    Args:
      name: its full name, such as "package.module".

    Returns:
      The module as imports left it; otherwise an empty one that knows its file and its
      package; None where there is none of that name.
    """
    if name in sys.modules:
        return sys.modules[name]
    parent, _, _ = name.rpartition(".")
    if not parent:
        spec = importlib.util.find_spec(name)
    else:
        folders = getattr(find(parent), "__path__", None)
        if folders is None:
            return None
        # Not `find_spec`, which runs the package.
        spec = importlib.machinery.PathFinder.find_spec(name, list(folders))
    if spec is None:
        return None
    module = types.ModuleType(name)
    module.__spec__, module.__package__ = spec, spec.parent
    if spec.has_location and spec.origin:
        module.__file__ = spec.origin
    if spec.submodule_search_locations is not None:
        module.__path__ = spec.submodule_search_locations
    return module
