"""Components by name: the library's own, and any class as "package.module:Class"."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from mosaic_jax.core import errors, schema

T = TypeVar("T")
# Objects that were handed in, by the import path that means them in this process.
_HANDED: dict[str, Any] = {}


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to components of one kind.

    Beyond the names of the mapping, `find` takes import paths "package.module:Class" of
    components that live elsewhere, the current folder included.
    """

    def __init__(
        self, field: str, entries: Mapping[str, T], kind: schema.Allowed
    ) -> None:
        """Register components.

        Args:
          field: the setting that names one of them.
          entries: those of this library, by name.
          kind: what a user's own must be; its test may raise what tells why not.
        """
        self.field, self.kind = field, kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        """The component of this library called `name`.

        Raises:
          KeyError: there is none.
        """
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Over the names in this library."""
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str) -> T:
        """The component called `name`, or at the import path "package.module:Class".

        Raises:
          ConfigError: there is none, it cannot be imported, or is of another kind.
        """
        if name in self._entries:
            return self._entries[name]
        if ":" not in name:
            raise errors.ConfigError(
                f"{self.field} = {name!r}: unknown, {schema.near(name, list(self))}; or"
                " 'package.module:Class' of your own"
            )
        found, why = load(name, self.field), ""
        try:
            fits = self.kind.test(found)
        except Exception as error:  # whatever the user's component raises
            fits, why = False, f": {type(error).__name__}: {errors.reason(error)}"
        if not fits:
            raise errors.ConfigError(
                f"{self.field} = {name!r}: must be {self.kind.phrase}{why}"
            )
        return found


def subclass_of(base: type) -> schema.Allowed:
    """The kind of a component that inherits `base` and has fields as settings.

    It has the functions that its bases leave open (`abc.abstractmethod`), and none that
    is called nearly as one of theirs, which would never be called.
    """
    return schema.Allowed(
        f"a frozen dataclass that inherits {place(base)}",
        lambda found: (
            schema.is_component(found) and issubclass(found, base) and _is_whole(found)
        ),
    )


def _is_whole(found: type) -> bool:
    """Whether a class has all functions that it should; else a TypeError names one."""
    names = [name for name in dir(found) if not name.startswith("_")]
    for name in names:
        if getattr(getattr(found, name), "__isabstractmethod__", False):
            raise TypeError(f"it has no function {name!r}")
    ours = [one for one in found.__mro__ if one.__module__.startswith("mosaic_jax.")]
    known = {name for one in ours for name in vars(one) if not name.startswith("_")}
    for name in names:
        if name in known or not inspect.isfunction(getattr(found, name)):
            continue
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise TypeError(
                f"nothing calls its function {name!r}: did you mean {near[0]!r}? Else"
                " give it a name that begins with an underscore"
            )
    return True


def group_of(name: str, component: type) -> str:
    """Name of the group in `methods` that holds the fields of a component.

    That is the component's attribute `group` if it has one, otherwise `name`; of an
    import path, the part after the colon, and only the class's own `group` counts, so
    that a class derived from one of this library has fields of its own.
    """
    _, path, own = name.rpartition(":")
    if path:
        return vars(component).get("group") or own
    return getattr(component, "group", "") or name


def add(known: dict[str, type], path: str, component: type) -> None:
    """Add a user's component to those known by their group in `methods`, in place.

    Args:
      known: components by group.
      path: import path of the component.
      component: the class at `path`.

    Raises:
      ConfigError: another component has the same group.
    """
    group = group_of(path, component)
    other = known.setdefault(group, component)
    if other is not component:
        raise errors.ConfigError(
            f"methods.{group}: has the fields of {place(other)} and of"
            f" {place(component)}: must be of one: rename yours, or give it `group`"
        )


def build(
    registry: Registry[type], name: str, methods: Mapping[str, Mapping[str, Any]]
) -> Any:
    """The component called `name`, with the values of its fields from `methods`.

    Args:
      registry: of the components of this kind.
      name: a name in the registry, or an import path "package.module:Class".
      methods: values of the fields of components, by `group_of` each.

    Raises:
      ConfigError: the component is unknown or of another kind, or a field is unknown
        or out of range.
    """
    component = registry.find(name)
    group = group_of(name, component)
    return schema.check(component, methods.get(group, {}), f"methods.{group}")


def hand(thing: Any, path: str = "") -> str:
    """Let an import path mean `thing` in this process, wherever it was defined.

    Args:
      thing: a class or function, or, with `path`, any object.
      path: that shall mean it; "": where `thing` says that it is.

    Returns:
      The path, for the settings.
    """
    path = path or place(thing)
    module, _, attribute = path.partition(":")
    if getattr(sys.modules.get(module), attribute, None) is thing:
        _HANDED.pop(path, None)  # it is what an import gives
    else:
        _HANDED[path] = thing
    return path


def load(path: str, field: str) -> Any:
    """The object at the import path `path`, "package.module:Class".

    Modules are looked for in the current folder as well.

    Raises:
      ConfigError: the module cannot be imported or has no such attribute; the message
        names `field`, the setting that holds the path.
    """
    if path in _HANDED:
        return _HANDED[path]
    module, _, attribute = path.partition(":")
    # As with `python -m`, modules in the current folder can be imported.
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise errors.ConfigError(
            f"{field} = {path!r}: cannot be imported: {type(error).__name__}:"
            f" {errors.reason(error)}"
        ) from error


def place(component: Any) -> str:
    """Import path of a class or function."""
    return f"{component.__module__}:{component.__qualname__}"
