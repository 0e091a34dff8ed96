"""Cards of methods: below what docs/cards/NAME.md says, what code and benchmarks say.

A person writes the title, the source and the equations of a method. Everything else
comes from where it stands: fields and docstring from the class, what differs from paper
and published code from docs/methods.md, accuracies from benchmarks/results.
"""

import functools
import inspect
import re
from collections.abc import Iterator

from benchmarks import accuracy, timing
from mosaic_jax.core.registry import group_of
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.algorithms.prototypical import Prototypical
from mosaic_jax.run import methods
from mosaic_jax.server import METHODS
from website import DOCS, settings
from website.tables import read, table

MOSAIC = "mosaic"
FOLDER = DOCS / "cards"
PARTS = "Clients with networks of several sizes"
# Sections of docs/methods.md whose rows are about all methods of a kind, unless a row
# begins with the names of some.
SECTIONS = {
    "Mosaic": {MOSAIC},
    PARTS: {name for name, of in ALGORITHMS.items() if issubclass(of, PartialTraining)},
    "Prototypes in place of models": {
        name for name, of in ALGORITHMS.items() if issubclass(of, Prototypical)
    },
    "Data-free training on the server": set(METHODS),
}


def names() -> list[str]:
    """Every method that has a card: Mosaic, algorithms, training on the server."""
    return [MOSAIC, *ALGORITHMS, *METHODS]


def component(name: str) -> type | None:
    """The class of a method; None of Mosaic, which is a chain of stages."""
    return {**ALGORITHMS, **METHODS}.get(name)


def field(name: str) -> str:
    """The setting that names a method."""
    if name == MOSAIC:
        return "method"
    return "init.method" if name in ALGORITHMS else "server.method"


def head(name: str) -> str:
    """What a person wrote; "" if nobody did."""
    path = FOLDER / f"{name}.md"
    return path.read_text() if path.exists() else ""


def title(name: str) -> str:
    """A method's name as people write it."""
    return head(name).partition("\n")[0].removeprefix("# ")


def source(name: str) -> str:
    """The paper, in Markdown."""
    found = re.search(r"^\*\*Source\*\*: (.*?)\n\n", head(name), re.DOTALL | re.M)
    return found[1].replace("\n", " ") if found else ""


def formulas(name: str) -> list[str]:
    """The equations of a card, in LaTeX."""
    return re.findall(r"^\$\$\n(.*?)\n\$\$$", head(name), re.DOTALL | re.M)


def listed() -> str:
    """The table of all cards."""
    lines = [
        (f"[{title(name)}]({name}.md)", f"`{field(name)} = {name!r}`", source(name))
        for name in names()
    ]
    return table(("method", "named by", "source"), lines)


def tail(name: str) -> str:
    """Markdown of what the code and the benchmarks say of a method."""
    parts = ["## Run it", f"```\n{command(name)}\n```", _told(name)]
    if rows := differences(name):
        parts += ["## What differs from the paper and its code", *rows]
    return "\n\n".join([*parts, "## Measured", measured(name)])


def command(name: str) -> str:
    """A command line that runs a small study of the method."""
    if name == MOSAIC:
        return "mosaic run --config digits_mosaic --workdir runs/mosaic"
    file = "heterogeneous" if name in SECTIONS[PARTS] else "baselines"
    return f"mosaic run --config {file}:digits:{name} --workdir runs/{name}"


def _told(name: str) -> str:
    """Docstring and fields."""
    found = component(name)
    if found is None:
        return (
            "The settings of its stages are groups of their own, from `generators` to"
            " `finetune`: [settings](../reference/settings.md)."
        )
    parts = ["## As it is computed here", inspect.getdoc(found) or ""]
    parts += [f"*Class* `{found.__module__}.{found.__qualname__}`"]
    own = settings.of_component(group_of(name, found))
    if own:
        parts += ["## Settings", settings.rows(own, anchored=False)]
    return "\n\n".join(parts)


# --- what differs


def differences(name: str) -> list[str]:
    """Tables of what is otherwise in the paper or its code, from docs/methods.md."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for heads, row, about in _rows():
        if name in about:
            found.setdefault(heads, []).append(row)
    return [table(heads, rows) for heads, rows in found.items()]


@functools.cache
def _rows() -> tuple[tuple[tuple[str, ...], list[str], frozenset[str]], ...]:
    """Head, row and methods of every row of docs/methods.md that is of a topic."""
    return tuple(
        (tuple(heads), row, frozenset(about(heading, row[0])))
        for heading, heads, rows in read((DOCS / "methods.md").read_text())
        if heads[0] == "topic"
        for row in rows
    )


def about(heading: str, topic: str) -> set[str]:
    """The methods that a row of docs/methods.md is about.

    Args:
      heading: of its section.
      topic: its first cell, which begins with the names of methods, or with none.
    """
    found = {name for name in names() if _mentions(topic, title(name))}
    return found or SECTIONS.get(heading, set())


def _mentions(topic: str, method: str) -> bool:
    return bool(method and re.search(rf"\b{re.escape(method)}\b", topic))


# --- what was measured


def measured(name: str) -> str:
    """Tables of the accuracies with today's settings in benchmarks/results."""
    groups: dict[tuple[str, float], list[accuracy.Cell]] = {}
    for config, cell in _cells():
        if _of(cell["method"]) == name and _is_of_today(config, cell):
            groups.setdefault((config, cell["alpha"]), []).append(cell)
    if not groups:
        return (
            "Not with today's settings; [results](../results.md) has all tables.\n\n"
            f"```\npython -m benchmarks.accuracy --name digits --methods {name}\n```"
        )
    parts = [
        part for terms, cells in groups.items() for part in _told_of(*terms, cells)
    ]
    return "\n\n".join([*parts, "[Results](../results.md) has it beside the others."])


@functools.cache
def _cells() -> tuple[tuple[str, accuracy.Cell], ...]:
    """All cells that were ever kept, by alpha, each with its configuration."""
    return tuple(
        (_config(path.stem, cell), cell)
        for path in sorted(timing.RESULTS.glob("accuracy_*.json"))
        for cell in sorted(timing.kept(path), key=lambda cell: cell["alpha"])
    )


def _of(method: str) -> str:
    """The method of a cell, without what is set otherwise and how it ends."""
    return method.partition("[")[0].removesuffix(methods.DECAY)


def _config(stem: str, cell: accuracy.Cell) -> str:
    """The configuration of a file of results, such as "fashion_mnist:small"."""
    data = cell["settings"]["data.name"]
    variant = stem.removeprefix(f"accuracy_{data}").removesuffix("_bfloat16")
    return data + variant.replace("_", ":", 1)


def _is_of_today(config: str, cell: accuracy.Cell) -> bool:
    terms = cell["alpha"], cell["seed"], cell["method"]
    dtype = cell["settings"]["model.dtype"]
    return accuracy.is_of_today(cell, accuracy.study_of(config, *terms, dtype))


def _told_of(config: str, alpha: float, cells: list[accuracy.Cell]) -> Iterator[str]:
    """A table, the command that prints it, and what it was measured on."""
    called = sorted({cell["method"] for cell in cells}, key=lambda one: (len(one), one))
    yield f"`{config}`, alpha {alpha}; test accuracy in per cent:"
    yield accuracy.table(cells)
    yield (
        f"```\npython -m benchmarks.accuracy --name {config} --alphas {alpha} \\\n"
        f'    --methods "{",".join(called)}"\n```'
    )
    on = sorted({f"{cell['processor']}, {cell['date']}" for cell in cells})
    yield f"*{'; '.join(on)}*"
