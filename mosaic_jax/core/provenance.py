"""Digests of code: a study notices when the code behind a result has changed."""

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
from typing import Any

from mosaic_jax.core import errors, files, live_code, modules, schema

_LIBRARY = __name__.partition(".")[0]
# Where components of this library live, and what they are made of.
_ROOMS = ("nn", "fl", "server")
# Nodes of a syntax tree that may have a docstring.
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def library_digest() -> str:
    """Hex sha256 over the source files of this library."""
    root = pathlib.Path(__file__).parents[1]
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return schema.digest({str(path): (root / path).read_text() for path in paths})


class Undeclared:
    """Takes the place of a component that a stage did not declare; any use raises."""

    def __init__(self, field: str) -> None:
        """`field` names the component in the settings."""
        self._field = field

    def __getattr__(self, name: str) -> Any:
        """Always raises UndeclaredError."""
        raise schema.UndeclaredError(
            f"{self._field} names a component that is used by a stage that does not"
            " declare it: name it in the stage's `reads`"
        )


def of_component(component: Any) -> dict[str, Any]:
    """Fields and code digest of an algorithm or server method, for a fingerprint."""
    fields = dataclasses.asdict(component)
    return {"fields": fields, "code": code_digest(type(component))}


def is_users(cls: Any) -> bool:
    """Whether a class or function is not of this library."""
    return _package(cls.__module__) != _LIBRARY


def code_digest(component: Any) -> str:
    """Hex sha256 of the code of a class or function.

    Code that has a file counts as `file_digest` says. Where it has none, as in a
    notebook, in a script that is run, and in functions within functions, the class or
    function counts with all that it refers to: see `live_code`.

    Raises:
      ConfigError: it refers to something whose changes would go unnoticed.
    """
    if live_code.is_live(component):
        # Not remembered: what it refers to may be another thing by now.
        return schema.digest(description(component))
    return file_digest(component)


def description(value: Any) -> Any:
    """What JSON holds of an object that a user made: its class's code, its fields.

    Two objects have the same description only if a study cannot tell them apart.

    Raises:
      ConfigError: it is made of something whose changes would go unnoticed.
    """
    return live_code.Reader(_of_file).read(value)


def _of_file(thing: Any) -> str | None:
    """Digest of a class, function or module with a file; None: only its name counts."""
    if isinstance(thing, types.ModuleType):
        if _is_installed(thing, ""):
            return None
        found: dict[str, str] = {}
        _collect(thing, _package(thing.__name__), found)
        return schema.digest(found)
    module = sys.modules.get(thing.__module__ or "builtins")
    if module is None or _is_installed(module, ""):
        return None
    if not is_users(thing) and _room(thing.__module__) not in _ROOMS:
        return None
    return file_digest(thing)


@functools.cache
def file_digest(component: Any) -> str:
    """Hex sha256 of the code of a class or function that has a file.

    Of a class the modules of its bases count as well as its own.

    Modules that those import count too, if they belong to the class's own package, lie
    in the user's folders, or in a room of this library where components live. Other
    installed packages do not count, nor does the rest of this library: the version of
    its file format stands for it. Comments, layout and docstrings do not count either.

    Raises:
      ConfigError: a module has no source file, so that changes would go unnoticed.
    """
    found: dict[str, str] = {}
    package = _package(component.__module__)
    for base in getattr(component, "__mro__", (component,)):
        module = sys.modules.get(base.__module__)
        if module is None or _is_installed(module, package):
            continue
        if getattr(module, "__file__", None):
            _collect(module, package, found)
        else:
            found[f"{base.__module__}:{base.__qualname__}"] = _source(base)
    return schema.digest({"class": component.__qualname__, "modules": found})


def _collect(module: types.ModuleType, package: str, found: dict[str, str]) -> None:
    """Add the code of `module`, and of what it imports of `package` or the user's."""
    name = module.__name__
    if name in found:
        return
    found[name] = _source(module)
    for imported in _imports(module):
        if _package(imported) == _LIBRARY and _room(imported) not in _ROOMS:
            continue
        other = modules.find(imported)  # a function may import it later
        if other is not None and not _is_installed(other, package):
            _collect(other, package, found)


def _imports(module: types.ModuleType) -> tuple[str, ...]:
    """Full names of all that `module` imports, anywhere in it."""
    try:
        return _imported(inspect.getsource(module), module.__package__ or "")
    except (OSError, TypeError):  # compiled
        return ()


# By the text, as many components share modules, and a module may be loaded anew.
@functools.cache
def _imported(text: str, package: str) -> tuple[str, ...]:
    """Full names of all that a module of `package` with this code imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dots, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(names)


def _source(thing: Any) -> str:
    """The code of a class, function or module, without comments; compiled: its hash."""
    path = pathlib.Path(getattr(thing, "__file__", None) or "")
    if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        return files.sha256(path)
    if path.is_file() and not path.stat().st_size:  # an __init__.py, say
        return ""
    try:
        return _uncommented(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError) as error:
        raise errors.ConfigError(
            f"{thing.__name__}: has no source file: must have one, so that a study"
            " notices when it changes"
        ) from error


@functools.cache
def _uncommented(text: str) -> str:
    """Code without comments and docstrings, laid out as `ast` does."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _room(name: str) -> str:
    """The part of this library that a module of it lies in; "" for the library."""
    return name.partition(".")[2].partition(".")[0]


def _package(name: str) -> str:
    """The top-level package of a module."""
    return name.partition(".")[0]


def _is_installed(module: types.ModuleType, package: str) -> bool:
    """Part of Python, or of an installed package but `package` and this library."""
    if _package(module.__name__) in (_LIBRARY, package):
        return False
    if module.__name__ in sys.builtin_module_names:
        return True
    path = getattr(module, "__file__", None)
    if not path:
        # Notebooks and scripts on stdin have no file; packages without code neither.
        return isinstance(
            getattr(module, "__spec__", None), importlib.machinery.ModuleSpec
        )
    parents = pathlib.Path(path).resolve().parents
    # Of other environments too, as PYTHONPATH or a .pth file may add them.
    elsewhere = {"site-packages", "dist-packages"} & {one.name for one in parents}
    return bool(elsewhere) or any(root in parents for root in _roots())


@functools.cache
def _roots() -> tuple[pathlib.Path, ...]:
    """Folders of Python's own modules and of installed packages."""
    folders = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(pathlib.Path(sysconfig.get_path(name)).resolve() for name in folders)
