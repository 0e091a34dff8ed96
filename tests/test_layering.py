"""A module imports only lower levels or its own package; libraries stay put."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "mosaic_jax"
LEVELS = [
    {"errors", "methods", "types"},
    {
        "files",
        "flops",
        "gating",
        "losses",
        "prng",
        "programs",
        "schedule",
        "shapes",
        "trees",
    },
    {"processes", "settings", "stopwatch"},
    {"models", "data", "tracking", "checkpoint", "environment", "provenance"},
    {
        "aggregation",
        "audit",
        "parallel",
        "classifier",
        "evaluation",
        "loop",
    },
    {"training", "gan", "prototypes"},
    {"algorithms", "distillation"},
    {"memory"},
    {"stages"},
    {"costs"},
    {"experiment"},
    {"estimate", "fairness"},
    {"report", "interop"},
    {"cli"},
    {"sweep"},
]
DESIGN = pathlib.Path(__file__).parents[1] / "docs" / "design.md"
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
HOMES = {
    "flax.linen": {"models"},
    "tensorflow_datasets": {"data"},
    "orbax": {"checkpoint"},
    "matplotlib": {"report"},
    "tensorflow": set(),
    "ml_collections": set(),
    "pickle": set(),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=str)
def test_imports(path):
    # A program of a room stands above all rooms.
    program = path.name == "__main__.py"
    room = "cli" if program else path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imports(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert room in homes, f"{name} does not belong in {room}"
        if name.startswith("mosaic_jax."):
            other = name.split(".")[1]
            assert other == room or LEVEL[other] < LEVEL[room], name


def test_the_design_tells_the_same_levels():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DESIGN.read_text(), re.MULTILINE)
    told = [set(re.findall(r"`(\w+)/?`", rooms)) for _, rooms in rows]
    assert [int(level) for level, _ in rows] == list(range(len(LEVELS)))
    assert told == LEVELS
