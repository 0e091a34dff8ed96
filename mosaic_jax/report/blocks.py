"""What stages show on a page: each kind of block of `stages.sections`, drawn."""

import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from mosaic_jax.core import errors
from mosaic_jax.report import figures, html
from mosaic_jax.stages.sections import Block, Heat, Scatter, Strips, Table, Text

_log = logging.getLogger(__name__)

Pictures = Mapping[str, np.ndarray]


def section(
    blocks: Sequence[tuple[Block, Pictures]], folder: html.FigureFolder
) -> Markup:
    """Blocks one below the other; neighbouring figures stand side by side.

    Args:
      blocks: each with the pictures of its stage.
      folder: that gets the figures as PNG.

    Raises:
      DataError: a block holds what its kind cannot draw.
    """
    parts = []
    for is_figure, group in itertools.groupby(
        blocks, lambda pair: isinstance(pair[0], Heat | Scatter)
    ):
        drawn = [_drawn(block, pictures, folder) for block, pictures in group]
        parts.append(html.side_by_side(*drawn) if is_figure else html.joined(drawn))
    return html.joined(parts)


def _drawn(block: Block, pictures: Pictures, folder: html.FigureFolder) -> Markup:
    try:
        match block:
            case Text():
                return html.paragraph(block.text)
            case Table():
                return html.table(block.head, block.rows, block.caption)
            case Heat():
                return folder.add(block.name, _heat(block), block.caption)
            case Scatter():
                return folder.add(block.name, _scatter(block), block.caption)
            case Strips():
                return _strips(block, pictures, folder)
    except (ValueError, TypeError, IndexError) as error:
        kind, name = type(block).__name__, getattr(block, "name", "")
        raise errors.DataError(
            f"{kind} {name!r} of a report: cannot be drawn: {errors.reason(error)}"
        ) from error


def _heat(block: Heat) -> figures.Figure:
    return figures.heat(
        np.array(block.values, float),
        xlabel=block.xlabel,
        ylabel=block.ylabel,
        label=block.label,
        fmt=".2f",
    )


def _scatter(block: Scatter) -> figures.Figure:
    return figures.scatter(
        block.x, block.y, xlabel=block.xlabel, ylabel=block.ylabel, level=block.level
    )


def _strips(block: Strips, pictures: Pictures, folder: html.FigureFolder) -> Markup:
    """A table of images, and one picture of all; nothing where an array is missing."""
    missing = [name for name in block.columns if name not in pictures]
    if missing:
        lost = ", ".join(map(repr, missing))
        _log.warning("no pictures %s; the report is without %r", lost, block.name)
        return Markup()
    columns = dict(
        zip(
            block.head[1:],
            ([_side_by_side(row) for row in pictures[name]] for name in block.columns),
            strict=True,
        )
    )
    folder.save(block.name, figures.strips(columns, block.names))
    rows = [
        (
            name,
            [
                html.image(column[i], f"{name}, {head}")
                for head, column in columns.items()
            ],
        )
        for i, name in enumerate(block.names)
    ]
    label = f"Images: {block.name.replace('_', ' ')}"
    film = html.strips(block.head, rows, label)
    if any(pictures[name].ndim != 5 for name in block.columns):
        return html.paragraph(block.caption) + film
    # The first and the last moment large; what is between them behind a line.
    ends = {head: i for i, head in enumerate(columns) if i in (0, len(columns) - 1)}
    large = [
        (name, {head: cells[i] for head, i in ends.items()}) for name, cells in rows
    ]
    shown = html.paragraph(block.caption) + html.pairs(large)
    if len(columns) < 3:
        return shown
    return shown + html.folded(f"All moments: {', '.join(columns)}", film)


def _side_by_side(images: np.ndarray) -> np.ndarray:
    """[n, H, W, D] as one image [H, n W, D]; an image [H, W, D] is left as it is."""
    return images if images.ndim == 3 else np.concatenate(list(images), axis=1)
