"""The numbers that a figure draws, for those who want to draw it again."""

import csv
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure


def of(figure: Figure) -> str:
    """The numbers that a figure draws, as comma-separated values with a heading.

    A row is a point of a line or of a cloud, a bar, or a cell of a map; names of bars
    and of a map's rows stand in place of their numbers.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    axes = figure.axes[0]
    head = [axis.get_text() or "value" for axis in (axes.xaxis.label, axes.yaxis.label)]
    if axes.images:
        bar = figure.axes[1].get_ylabel() if len(figure.axes) > 1 else "value"
        names = [label.get_text() for label in axes.get_yticklabels()]
        rows = np.ma.filled(np.ma.asarray(axes.images[0].get_array()), np.nan)
        writer.writerow([head[1], head[0], bar])
        for (row, column), value in np.ndenumerate(rows):
            name = names[row] if len(names) == len(rows) else row
            writer.writerow([name, column, _number(value)])
        return table.getvalue()
    writer.writerow(["series", *head])
    for container in axes.containers:
        if isinstance(container, BarContainer):
            for bar in container.patches:
                across = container.orientation == "horizontal"
                place = bar.get_y() + bar.get_height() / 2
                point = (bar.get_width(), _named(axes, place))
                if not across:
                    point = (round(bar.get_x() + bar.get_width() / 2), bar.get_height())
                name = _series(container.get_label())
                writer.writerow([name, *map(_number, point)])
        elif isinstance(container, ErrorbarContainer) and container.lines[0]:
            container.lines[0].set_label(container.get_label())
    for line in axes.lines:
        if line.get_linestyle() == "None":  # the ends of whiskers
            continue
        for point in np.asarray(line.get_xydata()):
            writer.writerow([_series(line.get_label()), *map(_number, point)])
    for cloud in axes.collections:
        if isinstance(cloud, PathCollection):
            for point in np.asarray(cloud.get_offsets()):
                writer.writerow([_series(cloud.get_label()), *map(_number, point)])
    return table.getvalue()


def _series(label: object) -> str:
    """The name of a line or of bars; those without one have names with "_" first."""
    return "" if str(label).startswith("_") else str(label)


def _named(axes: Axes, place: float) -> str:
    """What stands beside the bar at `place` of the vertical axis."""
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=False)
    return min(ticks, key=lambda pair: abs(pair[0] - place))[1].get_text()


def _number(value: Any) -> Any:
    return value if isinstance(value, str | int) else f"{float(value):.6g}"
