"""A stage's section of the report, as plain data: blocks that any report can draw.

Blocks are saved with the stage's record, so a report needs neither the stage's code nor
its settings. Images are saved beside the record; blocks refer to them by their names in
`Outcome.pictures`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells by row; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclasses.dataclass(frozen=True)
class Heat:
    """A heat map of a matrix.

    Attributes:
      name: of the picture's file.
      values: the matrix, row by row; None where there is no number.
      xlabel: label of the columns.
      ylabel: label of the rows.
      label: of the colour bar.
      caption: a sentence below the picture.
    """

    name: str
    values: Sequence[Sequence[float | None]]
    xlabel: str
    ylabel: str
    label: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A scatter plot of the points (`x[i]`, `y[i]`), with a line at y = `level`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    xlabel: str
    ylabel: str
    level: float
    caption: str


@dataclasses.dataclass(frozen=True)
class Strips:
    """Rows of images.

    Attributes:
      name: of the picture's file.
      head: headings of the columns: of the rows' names, then of the images.
      names: of the rows.
      columns: for each column of images, the name of an array in the stage's pictures.
        Its leading axis is the row; a cell is one image [H, W, D], or [n, H, W, D]
        images side by side.
      caption: a sentence below the images.
    """

    name: str
    head: Sequence[str]
    names: Sequence[str]
    columns: Sequence[str]
    caption: str


Block = Text | Table | Heat | Scatter | Strips
KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Text, Table, Heat, Scatter, Strips)
}


# More clients than this are counted, not named.
MOST_NAMES = 20


def named(clients: Sequence[int]) -> str:
    """The clients by their numbers, or how many they are."""
    if len(clients) > MOST_NAMES:
        return f"{len(clients)} clients"
    numbers = ", ".join(map(str, clients))
    return f"client {numbers}" if len(clients) == 1 else f"clients {numbers}"


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a title; a report merges sections that have the same title."""

    title: str
    blocks: Sequence[Block]


def to_json(section: Section) -> dict[str, Any]:
    """The section as data that JSON can represent."""
    blocks = [
        {"kind": type(block).__name__, **dataclasses.asdict(block)}
        for block in section.blocks
    ]
    return {"title": section.title, "blocks": blocks}


def from_json(content: dict[str, Any]) -> Section:
    """Inverse of `to_json`.

    Raises:
      ValueError: `content` is not a section.
    """
    try:
        blocks = [
            KINDS[block["kind"]](**{k: v for k, v in block.items() if k != "kind"})
            for block in content["blocks"]
        ]
        return Section(content["title"], blocks)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no section of a report: {error}") from error
