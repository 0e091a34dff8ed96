"""Pages of the API: public names by the room of the library that they live in."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mosaic_jax
from website.tables import table

# Page: its title, the rooms whose public names it has, and the modules it has in full.
PAGES: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "studies": (
        "Studies and results",
        ("api", "configs", "data"),
        ("data.given", "interop.torch"),
    ),
    "runs": ("Settings, summaries, callbacks", ("run",), ()),
    "algorithms": (
        "Federated algorithms",
        ("fl",),
        (
            "fl.client_program",
            "fl.local_sgd",
            "fl.algorithms.prototypical",
            "fl.algorithms.partial",
            "fl.uploads",
        ),
    ),
    "server": ("Training on the server", ("server",), ("server.base",)),
    "stages": ("Stages", ("stages",), ("core.steps", "stages.sections")),
    "parts": (
        "What parts are made of",
        (),
        ("core.schema", "core.types", "core.prng", "nn.losses"),
    ),
}
SHORT = "mj"


def pages() -> dict[str, str]:
    """Markdown of each page by its path."""
    found = {"reference/index.md": _index()}
    for name, (title, rooms, modules) in PAGES.items():
        parts = [f"# {title}"]
        parts += [
            _entry(place, heading=f"{SHORT}.{public}")
            for public, place in public_names().items()
            if room_of(place) in rooms
        ]
        parts += [_entry(f"mosaic_jax.{module}") for module in modules]
        found[f"reference/{name}.md"] = "\n\n".join(parts) + "\n"
    return found


def public_names() -> dict[str, str]:
    """Where each public name of the library is defined, by the name."""
    homes = {name: f"{home}.{name}" for name, home in mosaic_jax._HOMES.items()}
    found = {**homes, **mosaic_jax._MODULES}
    return {name: f"mosaic_jax.{found[name]}" for name in sorted(found)}


def room_of(place: str) -> str:
    """The room of the library in which an import path lies."""
    return place.split(".")[1]


def _entry(place: str, heading: str = "") -> str:
    """What mkdocstrings replaces by the documentation of the object at `place`."""
    lines = [f"::: {place}", "    options:", f"      heading: {heading or place}"]
    return "\n".join([*lines, f"      toc_label: {heading or place}"])


def _index() -> str:
    rows = []
    for name, (title, rooms, modules) in PAGES.items():
        here = [
            f"[`{SHORT}.{public}`]({name}.md#{place})"
            for public, place in public_names().items()
            if room_of(place) in rooms
        ]
        here += [f"[`{module}`]({name}.md#mosaic_jax.{module})" for module in modules]
        rows.append((f"[{title}]({name}.md)", ", ".join(here)))
    names = [
        (f"`{SHORT}.{name}`", _first_line(getattr(mosaic_jax, name)))
        for name in public_names()
    ]
    return "\n\n".join(
        [
            "# Reference",
            f"`{SHORT}` is `import mosaic_jax as {SHORT}`. Code outside of the library"
            " may rely on these names; the modules below are for those who extend it.",
            table(("", ""), names),
            table(("page", "has"), rows),
            "[Settings](settings.md) has every field of a study.",
        ]
    )


def _first_line(found: Any) -> str:
    return (inspect.getdoc(found) or "").partition("\n")[0]


def modules() -> Iterator[str]:
    """Every module that a page has in full."""
    for _, _, found in PAGES.values():
        yield from found
