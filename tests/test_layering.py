"""A module imports only lower levels or its own package; libraries stay put."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "mosaic_jax"
# A room may import those before it, within its layer too.
LAYERS = [
    ("core",),
    ("data", "nn"),
    ("fl", "server"),
    ("stages", "run"),
    ("report", "interop", "configs", "api", "cli"),
]
DESIGN = pathlib.Path(__file__).parents[1] / "docs" / "design.md"
TYPES = "TYPE_CHECKING"
ORDER = [room for rooms in LAYERS for room in rooms]
HOMES = {
    "flax.linen": {"nn"},
    "tensorflow_datasets": {"data"},
    "orbax": {"run"},
    "matplotlib": {"report"},
    "tensorflow": set(),
    "ml_collections": {"cli"},
    "pickle": set(),
}


def imports(path):
    """What a module imports when it runs: without names for type checkers alone."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == TYPES:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=str)
def test_imports(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for name in imports(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert room in homes, f"{name} does not belong in {room}"
        if name.startswith("mosaic_jax."):
            other = name.split(".")[1]
            assert ORDER.index(other) <= ORDER.index(room), name


def test_the_design_tells_the_same_layers():
    rows = re.findall(r"^\| \d+, .* \| (.*) \|$", DESIGN.read_text(), re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)/`", rooms)) for rooms in rows] == LAYERS


def test_every_room_has_its_place():
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("room", ["stages", "server"])
def test_programs_are_told(room):
    """One that `jax.jit` made itself would run in a study that is only counted."""
    for path in (ROOT / room).rglob("*.py"):
        assert "jax.jit" not in path.read_text(), path
