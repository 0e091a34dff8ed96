"""What the result of a stage comes from: the settings, code and data that it can see.

A stage declares which settings it reads and is given a `View` of these and no others,
so its fingerprint can leave nothing out.
"""

import ast
import dataclasses
import functools
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
import sysconfig
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mosaic_jax import errors, files, settings

# Settings, or groups of them, that cannot change a result, each with the reason. Every
# stage may read them; no fingerprint knows them.
NEUTRAL: Mapping[str, str] = {
    "seeds": "says how many studies there are; each seed is a study of its own",
    "compare": "says which studies are run; each method is a study of its own",
    "profile": "records how long operations take",
    "data.dir": "says where images lie; the images themselves count",
    "evaluation": "says how and how often models are measured; training is the same",
    "compute": "lays the work out; results differ by rounding only",
    "log": "says what is shown, and how often a run is saved",
}
# Read by every stage: its random stream, and the networks that it is given.
ALWAYS = ("seed", "model")


class UndeclaredError(AttributeError):
    """A stage reads a setting, or uses a component, that it did not declare."""


class View:
    """The settings that a stage declared, and those in `NEUTRAL`; nothing else.

    Groups and fields are read as attributes, as in `Settings`.
    """

    def __init__(
        self, group: Any, declared: Collection[str], *, prefix: str = ""
    ) -> None:
        """Show the part of `group`, whose name ends in `prefix`, that is `declared`."""
        self._group, self._declared, self._prefix = group, frozenset(declared), prefix

    def __getattr__(self, name: str) -> Any:
        """The field or group `name`.

        Raises:
          UndeclaredError: it is not in this view.
        """
        full, value = self._prefix + name, getattr(self._group, name)
        if is_covered(full, self._declared) or is_covered(full, NEUTRAL):
            return value
        if any(one.startswith(f"{full}.") for one in (*self._declared, *NEUTRAL)):
            return View(value, self._declared, prefix=f"{full}.")
        raise UndeclaredError(
            f"{full} is read by a stage that does not declare it: name it in the"
            " stage's `reads`"
        )

    def content(self) -> dict[str, Any]:
        """Every declared value that may change a result, by dotted name; JSON-able."""
        return {
            name: value
            for name, value in leaves(self._group)
            if is_covered(name, self._declared) and not is_covered(name, NEUTRAL)
        }


def view(study: settings.Settings, reads: Collection[str]) -> View:
    """What a stage that `reads` these fields and groups (dotted names) sees of a study.

    Raises:
      UndeclaredError: a name is no field and no group.
    """
    declared = {*ALWAYS, *reads}
    known = {name for name, _ in leaves(study)}
    for name in sorted(declared):
        if not any(is_covered(field, {name}) for field in known):
            raise UndeclaredError(f"{name}: no such setting")
    return View(study, declared)


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each field of nested settings by dotted name, with its value.

    `methods`, which holds fields of components by their names, counts as one field.
    """
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def library_digest() -> str:
    """sha256 over the source of this library."""
    root = pathlib.Path(__file__).parent
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return settings.digest({str(path): (root / path).read_text() for path in paths})


def is_covered(name: str, declared: Collection[str]) -> bool:
    """Whether `name` or a group that it lies in is declared."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in declared for i in range(len(parts)))


class Undeclared:
    """Stands where a stage did not declare that it uses a component."""

    def __init__(self, field: str) -> None:
        """`field` names the component in the settings."""
        self._field = field

    def __getattr__(self, name: str) -> Any:
        """Always raises UndeclaredError."""
        raise UndeclaredError(
            f"{self._field} names a component that is used by a stage that does not"
            " declare it: name it in the stage's `reads`"
        )


def of_component(component: Any) -> dict[str, Any]:
    """What makes an algorithm or a method of the server what it is; JSON-able."""
    fields = dataclasses.asdict(component)
    return {"fields": fields, "code": code_digest(type(component))}


@functools.cache
def code_digest(cls: type) -> str:
    """sha256 of the code of a class: of the modules that it and its bases live in.

    Also of those that they import, of the class's own package or in the user's folders.
    Other installed packages do not count, nor does this library beyond the classes' own
    modules: `experiment.FORMAT` stands for it. Comments, layout and docstrings do not
    count either.

    Raises:
      ConfigError: there is no source, so that a change could not be seen.
    """
    found: dict[str, str] = {}
    package = _package(cls.__module__)
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if module is None or _is_installed(module, package):
            continue
        if getattr(module, "__file__", None):
            _collect(module, package, found)
        else:
            found[f"{base.__module__}:{base.__qualname__}"] = _source(base)
    return settings.digest({"class": cls.__qualname__, "modules": found})


def _collect(module: types.ModuleType, package: str, found: dict[str, str]) -> None:
    """Add the code of `module`, and of what it imports of `package` or the user's."""
    name = module.__name__
    if name in found:
        return
    found[name] = _source(module)
    if _package(name) == __package__:
        return
    for imported in _imports(module):
        other = sys.modules.get(imported)
        ours = _package(imported) == __package__
        if other is not None and not ours and not _is_installed(other, package):
            _collect(other, package, found)


def _imports(module: types.ModuleType) -> Iterator[str]:
    """Names of all that `module` imports, anywhere in it, as `sys.modules` has them."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # compiled
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, module.__package__ or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _source(thing: type | types.ModuleType) -> str:
    """The code of a class or module, without comments; compiled: its hash."""
    path = pathlib.Path(getattr(thing, "__file__", None) or "")
    if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        return files.sha256(path)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError) as error:
        raise errors.ConfigError(
            f"{thing.__name__}: has no source file: must have one, so that a study"
            " notices when it changes"
        ) from error
    for node in ast.walk(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _package(name: str) -> str:
    """The top-level package of a module."""
    return name.partition(".")[0]


def _is_installed(module: types.ModuleType, package: str) -> bool:
    """Part of Python, or of an installed package but `package` and this library."""
    if _package(module.__name__) in (__package__, package):
        return False
    if module.__name__ in sys.builtin_module_names:
        return True
    path = getattr(module, "__file__", None)
    if not path:
        # Notebooks and scripts on stdin have no file; packages without code neither.
        return isinstance(
            getattr(module, "__spec__", None), importlib.machinery.ModuleSpec
        )
    folders = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = [pathlib.Path(sysconfig.get_path(name)).resolve() for name in folders]
    return any(root in pathlib.Path(path).resolve().parents for root in roots)
