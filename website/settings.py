"""The page of all settings, from what their parts declare."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from mosaic_jax.cli import list as listing
from mosaic_jax.core import registry, schema
from mosaic_jax.run import settings
from website.tables import table

PAGE = "reference/settings.md"
HEAD = ("field", "default", "may be", "meaning")
Field = tuple[str, dataclasses.Field, Any]
ABOUT = """# Settings

Every field of a study, with its default, what it may be and what it means, as `mosaic
list fields` prints them. Each is a flag of `mosaic run` after `--config`, and an
attribute of the ConfigDict that `mj.configs.get` returns:

```
mosaic run --config digits_mosaic --config.distill.steps=300
mosaic show digits_mosaic --changed
```

A wrong field or value ends in one line before any work. Configurations set many of
these fields: `mosaic show CONFIG` tells what a study has, and with `--changed` only
where that is not the default.
"""


def page() -> str:
    """Markdown: a section for each group, those of components last."""
    groups: dict[str, list[Field]] = {}
    for one in listing.fields():
        groups.setdefault(one[0].rpartition(".")[0], []).append(one)
    sections = [ABOUT]
    for name, fields in groups.items():
        title = f"`{name}`" if name else "The study"
        sections += [f"## {title}", _meaning(name), rows(fields)]
    sections += ["## What changes no result", _neutral()]
    return "\n\n".join(filter(None, sections)) + "\n"


def rows(fields: Iterable[Field], *, anchored: bool = True) -> str:
    """The table of some fields.

    Args:
      fields: as `mosaic_jax.cli.list.fields` has them.
      anchored: whether links to a field lead here.
    """
    return table(HEAD, (_row(*one, anchored) for one in fields))


def names() -> Iterator[str]:
    """The dotted name of every field."""
    return (name for name, _, _ in listing.fields())


def of_component(name: str) -> list[Field]:
    """The fields in the group `methods.NAME`."""
    return [one for one in listing.fields() if one[0].startswith(f"methods.{name}.")]


def _row(name: str, one: dataclasses.Field, default: Any, anchored: bool) -> list[str]:
    allowed = schema.allowed_of(one).phrase
    if allowed == "any":
        allowed = one.type.__name__ if isinstance(one.type, type) else str(one.type)
    field = f'<code id="{name}">{name}</code>' if anchored else f"`{name}`"
    return [field, f"`{default!r}`", allowed, one.metadata.get("meaning", "")]


def _meaning(group: str) -> str:
    """First line of the docstring of the class that declares a group."""
    *_, name = group.split(".")
    if group.startswith("methods."):
        found: Any = settings.components()[name]
        return f"Of {_names(found, name)}."
    if not group:
        return ""
    found = settings.Settings
    for part in group.split("."):
        found = {one.name: one.type for one in dataclasses.fields(found)}[part]
    return (found.__doc__ or "").partition("\n")[0]


def _names(component: type, group: str) -> str:
    """The names that components with these fields have in the settings."""
    found = [
        f"`{known.field} = {name!r}`"
        for known in settings.COMPONENTS
        for name, other in known.items()
        if registry.group_of(name, other) == group
    ]
    return ", ".join(found) or component.__name__


def _neutral() -> str:
    return table(
        ("field or group", "because it"),
        [(f"`{name}`", why) for name, why in settings.NEUTRAL.items()],
    )
