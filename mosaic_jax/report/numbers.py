"""The numbers that a figure draws, for those who want to draw it again."""

import csv
import io
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure


class Series(NamedTuple):
    """A line, a cloud of points, or bars of one kind."""

    name: str
    """"" where the figure gives none."""
    kind: str
    """"line", "points", "bars", or "across": bars from left to right."""
    points: list[tuple[Any, Any]]
    """Along the horizontal and the vertical axis; names of bars in place of numbers."""
    artist: Artist
    """What draws it; of bars, the first."""
    spread: tuple[float, ...] = ()
    """Of each point, the length of its whisker on either side; () without whiskers."""


class Cells(NamedTuple):
    """A map of numbers."""

    rows: list[Any]
    """Names of the rows; their numbers where they have none."""
    values: np.ndarray
    """[rows, columns]; NaN where there is none."""
    label: str
    """What a number is."""


def cells(figure: Figure) -> Cells | None:
    """The map that a figure draws; None: it draws none."""
    axes = figure.axes[0]
    if not axes.images:
        return None
    label = figure.axes[1].get_ylabel() if len(figure.axes) > 1 else "value"
    names = [label.get_text() for label in axes.get_yticklabels()]
    values = np.ma.filled(np.ma.asarray(axes.images[0].get_array()), np.nan)
    rows = names if len(names) == len(values) else list(range(len(values)))
    return Cells(rows, values, label)


def series(figure: Figure) -> list[Series]:
    """The bars, lines and clouds that a figure draws, in this order."""
    axes, found = figure.axes[0], []
    whiskers = {}
    for container in axes.containers:
        if isinstance(container, BarContainer):
            across = container.orientation == "horizontal"
            points = [_bar(axes, bar, across=across) for bar in container.patches]
            kind, name = "across" if across else "bars", _name(container.get_label())
            spread = _whiskers(container.errorbar)
            found.append(Series(name, kind, points, container.patches[0], spread))
        elif isinstance(container, ErrorbarContainer) and container.lines[0]:
            whiskers[container.lines[0]] = container
    for line in axes.lines:
        if line.get_linestyle() != "None":  # the ends of whiskers
            of_line = whiskers.get(line)
            name = _name((of_line or line).get_label())
            points, spread = _pairs(line.get_xydata()), _whiskers(of_line)
            found.append(Series(name, "line", points, line, spread))
    for cloud in axes.collections:
        if isinstance(cloud, PathCollection):
            points = _pairs(cloud.get_offsets())
            found.append(Series(_name(cloud.get_label()), "points", points, cloud))
    return found


def of(figure: Figure) -> str:
    """The numbers that a figure draws, as comma-separated values with a heading.

    A row is a point of a line or of a cloud, a bar, or a cell of a map; names of bars
    and of a map's rows stand in place of their numbers. Where points have
    whiskers, a last column has their lengths.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    axes = figure.axes[0]
    head = [axis.get_text() or "value" for axis in (axes.xaxis.label, axes.yaxis.label)]
    if found := cells(figure):
        writer.writerow([head[1], head[0], found.label])
        for (row, column), value in np.ndenumerate(found.values):
            writer.writerow([found.rows[row], column, _number(value)])
        return table.getvalue()
    every = series(figure)
    has_spread = any(one.spread for one in every)
    writer.writerow(["series", *head, *["spread"] * has_spread])
    for one in every:
        spread = one.spread or [""] * (len(one.points) * has_spread)
        ends = [[length] for length in spread] or [[]] * len(one.points)
        for point, end in zip(one.points, ends, strict=True):
            writer.writerow([one.name, *map(_number, [*point, *end])])
    return table.getvalue()


def _whiskers(container: Any) -> tuple[float, ...]:
    """Half of the length of each whisker; () where there are none."""
    if container is None:
        return ()
    segments = container.lines[2][0].get_segments()
    return tuple(float(np.abs(part[1] - part[0]).max()) / 2 for part in segments)


def _pairs(points: Any) -> list[tuple[Any, Any]]:
    return [(float(x), float(y)) for x, y in np.asarray(points)]


def _bar(axes: Axes, bar: Any, *, across: bool) -> tuple[Any, Any]:
    """Where a bar stands and how long it is, in the order of the axes."""
    if across:
        place = bar.get_y() + bar.get_height() / 2
        return float(bar.get_width()), _named(axes, place)
    return round(bar.get_x() + bar.get_width() / 2), float(bar.get_height())


def _name(label: object) -> str:
    """The name of a line or of bars; those without one have names with "_" first."""
    return "" if str(label).startswith("_") else str(label)


def _named(axes: Axes, place: float) -> str:
    """What stands beside the bar at `place` of the vertical axis."""
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=False)
    return min(ticks, key=lambda pair: abs(pair[0] - place))[1].get_text()


def _number(value: Any) -> Any:
    return value if isinstance(value, str | int) else f"{float(value):.6g}"
