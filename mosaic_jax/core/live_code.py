"""Code without a file of its own, as in notebooks: told by what Python made of it.

A class of a notebook or a script stands in no module whose text could be compared. What
it does is told by the bytecode of its functions and by all that they refer to: other
such classes and functions, constants, arrays. So no edit goes unnoticed, in whichever
cell it is, and no other cell counts.
"""

import contextlib
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.util
import json
import logging
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mosaic_jax.core import errors, modules

# What is told by its text.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...)),
    *(enum.Enum, pathlib.PurePath, re.Pattern, np.dtype, np.generic, logging.Logger),
    *(types.GenericAlias, types.UnionType, type(dataclasses.MISSING)),
)
# Of a class: what Python, `dataclasses` and flax keep there for themselves.
_KEPT_ASIDE = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__"),
    *("__annotations__", "__abstractmethods__", "_abc_impl", "__match_args__"),
    *("__dataclass_fields__", "__dataclass_params__", "__firstlineno__"),
    *("__static_attributes__", "_state", "_parent_ref", "__orig_bases__"),
    *("__annotations_cache__", "__annotate_func__", "__parameters__"),
}
# Likewise of a dataclass.
_GENERATED = {"__init__", "__repr__", "__eq__", "__hash__"}
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
# Fields of a flax module that say where it is used.
_PLACE = ("parent", "name")


def is_live(component: Any) -> bool:
    """Whether a class or function is told by what it is, and not by its file."""
    module = sys.modules.get(component.__module__)
    nested = any(mark in component.__qualname__ for mark in ("<locals>", "<lambda>"))
    return nested or module is None or _is_interactive(module)


def _is_interactive(module: types.ModuleType) -> bool:
    """Whether the code of a module has no file, or runs from one as a script."""
    spec = getattr(module, "__spec__", None)
    is_script = module.__name__ == "__main__"
    return is_script or (not getattr(module, "__file__", None) and spec is None)


class Reader:
    """Describes a value so that JSON holds it, and all that the value refers to."""

    def __init__(self, of_file: Callable[[Any], str | None]) -> None:
        """Nothing is read yet.

        Args:
          of_file: digest of a class, function or module that has a file; None where
            its name says enough, as of an installed package.
        """
        self._of_file = of_file
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no other object gets the same id

    def read(self, value: Any, name: str = "") -> Any:
        """What JSON holds of `value`, which `name` refers to.

        Raises:
          ConfigError: it is, or refers to, something that cannot be told from another.
        """
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, list | tuple | set | frozenset | Mapping):
            return [type(value).__name__, self._items(value, name)]
        if isinstance(value, types.ModuleType):
            interactive = _is_interactive(value)
            return [value.__name__, None if interactive else self._of_file(value)]
        if id(value) in self._seen:
            return f"#{self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return self._read(value, name)

    def _items(self, value: Any, name: str) -> list[Any]:
        if isinstance(value, Mapping):
            pairs = [(self.read(k, name), self.read(v, name)) for k, v in value.items()]
            return sorted(pairs, key=json.dumps)
        items = [self.read(one, name) for one in value]
        return items if isinstance(value, list | tuple) else sorted(items, key=str)

    def _read(self, value: Any, name: str) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.MethodType):
            return [self.read(value.__func__, name), self.read(value.__self__, name)]
        if isinstance(value, functools.partial):
            return self.read((value.func, value.args, value.keywords), name)
        if isinstance(value, property):
            return self.read((value.fget, value.fset), name)
        if isinstance(value, classmethod | staticmethod):
            return self.read(value.__func__, name)
        if isinstance(value, functools.cached_property):
            return self.read(value.func, name)
        if hasattr(value, "__wrapped__"):  # of `jax.jit` or `jax.custom_vjp`, say
            kind, wrapped = type(value), self.read(value.__wrapped__, name)
            return [kind.__qualname__, wrapped, self.read(self._beside(value), name)]
        if (array := _as_array(value)) is not None:
            return _array(array)
        if isinstance(value, types.BuiltinFunctionType | np.ufunc):
            return f"{getattr(value, '__module__', '')}:{value.__name__}"
        return self._object(value, name)

    def _beside(self, value: Any) -> dict[str, Any]:
        """What a wrapper holds beside what it wraps, as `defvjp` sets it."""
        # A package's own notes tell in which line the code is.
        aside = "_" if self._class(type(value))[-1] is None else "__"
        held = getattr(value, "__dict__", {})
        return {k: v for k, v in held.items() if not k.startswith(aside)}

    def _wrapper(self, function: types.FunctionType, where: types.ModuleType) -> Any:
        """A function that a decorator with a file made."""
        wrapped, decorator = self.read(function.__wrapped__), self._of_file(where)
        enclosed = []
        for cell in function.__closure__ or ():
            content, seen = cell.cell_contents if _is_set(cell) else None, {*self._seen}
            try:
                enclosed.append(
                    self.read(content, f"what {function.__name__} encloses")
                )
            except errors.ConfigError:
                if decorator is not None:
                    raise
                # What a package keeps for itself, as `jax.named_scope` does.
                self._seen = {k: v for k, v in self._seen.items() if k in seen}
                enclosed.append(type(content).__qualname__)
        defaults = self.read((function.__defaults__, function.__kwdefaults__))
        told = function.__code__.co_qualname
        return [told, decorator, wrapped, enclosed, defaults]

    def _function(self, function: types.FunctionType) -> Any:
        where = sys.modules.get(function.__globals__.get("__name__", ""))
        has_file = where is not None and not _is_interactive(where)
        if where is not None and has_file and hasattr(function, "__wrapped__"):
            return self._wrapper(function, where)
        enclosed = [
            self.read(cell.cell_contents, f"what {function.__name__} encloses")
            for cell in function.__closure__ or ()
            if _is_set(cell)
        ]
        defaults = self.read((function.__defaults__, function.__kwdefaults__))
        if has_file:
            told = f"{function.__module__}:{function.__qualname__}"
            return [told, self._of_file(function), enclosed, defaults]
        reached = {
            name: self.read(function.__globals__[name], name)
            for name in sorted(set(_globals(function.__code__)))
            if name in function.__globals__
        }
        package = function.__globals__.get("__package__") or ""
        for name in sorted(set(_imported(function.__code__, package))):
            if (module := modules.find(name)) is not None:
                reached[f"import {name}"] = self.read(module)
        return [self._code(function.__code__), enclosed, defaults, reached]

    def _code(self, code: types.CodeType) -> Any:
        consts = [
            self._code(one) if isinstance(one, types.CodeType) else self.read(one)
            for one in code.co_consts
        ]
        arguments = code.co_argcount + code.co_kwonlyargcount
        names = [*code.co_names, *code.co_varnames[:arguments]]
        return [code.co_code.hex(), names, consts]

    def _class(self, cls: type) -> Any:
        told = f"{cls.__module__}:{cls.__qualname__}"
        if not is_live(cls):
            return [told, self._of_file(cls)]
        aside = _KEPT_ASIDE
        if "__dataclass_params__" in vars(cls):
            aside = _KEPT_ASIDE | _GENERATED
        body = {
            name: self.read(value, f"{cls.__qualname__}.{name}")
            for name, value in sorted(vars(cls).items())
            if name not in aside and not _is_generated(value)
        }
        return [told, [self.read(base) for base in cls.__mro__[1:]], body]

    def _object(self, value: Any, name: str) -> Any:
        kind = type(value)
        if dataclasses.is_dataclass(value):
            fields = {one.name: getattr(value, one.name, None) for one in _own(value)}
            return [self.read(kind), self.read(fields, name)]
        installed = self._class(kind)[-1] is None
        held = getattr(value, "__dict__", {} if kind is object else None)
        # Of a package, one that holds nothing stands for itself.
        if held is not None and (not installed or not held):
            return [self.read(kind), self.read(held, name)]
        told = f"{kind.__module__}.{kind.__qualname__}"
        raise errors.ConfigError(
            f"{name or kind.__name__}: is a {told}, whose changes a study would not"
            " notice: must be a constant, an array, a function, a class or a dataclass;"
            " or put the code into a module"
        )


def _own(value: Any) -> Iterator[dataclasses.Field]:
    """The fields of a dataclass that say what it is."""
    place = _PLACE if hasattr(value, "scope") else ()
    return (f for f in dataclasses.fields(value) if f.init and f.name not in place)


def _globals(code: types.CodeType) -> Iterator[str]:
    """Names that a function, or one within it, looks up in its module."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _globals(one)


def _imported(code: types.CodeType, package: str) -> Iterator[str]:
    """Names of what may be modules that a function, or one within it, imports.

    Args:
      code: of the function.
      package: that the function's module is in; "": in none.
    """
    steps = [s for s in dis.get_instructions(code) if s.opname != "EXTENDED_ARG"]
    base = ""
    for i, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":  # after the number of dots, and what it takes
            base = "." * steps[i - 2].argval + step.argval
            with contextlib.suppress(ImportError):  # the function itself will tell
                base = importlib.util.resolve_name(base, package)
                yield base
        elif step.opname == "IMPORT_FROM":
            yield f"{base}.{step.argval}"
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _imported(one, package)


def _is_generated(value: Any) -> bool:
    """Whether a class has it from `dataclasses`, or as the place of a value."""
    if isinstance(value, _DESCRIPTORS):
        return True
    code = getattr(value, "__code__", None)
    return code is not None and "__create_fn__" in code.co_qualname


def _is_set(cell: types.CellType) -> bool:
    try:
        return bool(cell.cell_contents) or True
    except ValueError:  # of a variable that has no value yet
        return False


def _as_array(value: Any) -> np.ndarray | None:
    """`value` in host memory; None: it is no array, or one of pointers."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        return None
    try:
        array = np.asarray(value)
    except TypeError:  # a random key, say
        return None
    return None if array.dtype.hasobject else array


def _array(array: np.ndarray) -> list[Any]:
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), content]
