"""Every public function says what it takes: what a reader needs besides its types."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "mosaic_jax"
# Methods that many classes have: the class that declares them says what they take.
HOOKS = {
    path: {
        function.name
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef)
        for function in node.body
        if isinstance(function, ast.FunctionDef)
    }
    for path in (
        "core/schema.py",
        "stages/base.py",
        "server/base.py",
        "fl/client_program.py",
        "fl/local_sgd.py",
        "fl/holdings.py",
        "fl/uploads.py",
        "fl/algorithms/base.py",
        "fl/algorithms/partial.py",
        "fl/algorithms/prototypical.py",
        "run/callbacks.py",
    )
}
INHERITED = set().union(*HOOKS.values()) | {"__call__", "features", "head", "setup"}


def functions(path):
    """(name, function, whether it is an inherited method) of public ones in a file."""
    tree = ast.parse(path.read_text())
    scopes = [(tree.body, False)]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    scopes += [(node.body, True) for node in classes]
    for body, in_class in scopes:
        for node in body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name.startswith("_") and node.name != "__init__":
                continue
            inherited = in_class and node.name in INHERITED and not declares(path, node)
            yield node, inherited


def declares(path, node):
    return node.name in HOOKS.get(path.relative_to(ROOT).as_posix(), set())


def arguments(node):
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [one.arg for one in given if one.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=str)
def test_arguments_are_told(path):
    missing = []
    for node, inherited in functions(path):
        names, text = arguments(node), ast.get_docstring(node) or ""
        if inherited or len(names) < 3 or (node.name == "__init__" and not text):
            continue
        told = text.partition("Args:")[2]
        missing += [
            f"{node.name}({name}), line {node.lineno}"
            for name in names
            if f"{name}:" not in told and f"{name}," not in told
        ]
    assert not missing, "\n".join(missing)
