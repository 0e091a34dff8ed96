"""Figures as interactive charts of Plotly: hover, zoom, and lines to switch off.

What they draw is what `numbers` reads from the figure, so that a chart, its picture and
its numbers cannot differ.
"""

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mosaic_jax.core import errors
from mosaic_jax.report import numbers
from mosaic_jax.report.figures import COLOURS

# In pixels: the height of a chart for an inch of its figure.
_PER_INCH = 96
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def library() -> Markup:
    """The script that draws charts, as a page carries it.

    Raises:
      ConfigError: Plotly is not installed.
    """
    try:
        from plotly import offline
    except ImportError as error:
        raise errors.ConfigError(
            "interactive charts: need the package plotly: pip install plotly"
        ) from error
    return Markup(offline.get_plotlyjs())


def chart(figure: Figure) -> dict[str, Any]:
    """What Plotly draws of a figure: {"data", "layout"}, as JSON has them."""
    axes = figure.axes[0]
    layout: dict[str, Any] = {
        "height": round(_PER_INCH * figure.get_figheight()),
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "xaxis": _axis(axes, "x"),
        "yaxis": _axis(axes, "y"),
    }
    if found := numbers.cells(figure):
        return {"data": [_map(found)], "layout": layout}
    data, shapes = _bands(axes), []
    for one in numbers.series(figure):
        if one.kind == "line" and one.artist.get_transform() != axes.transData:
            shapes.append(_level(one))
        else:
            data.append(_trace(one))
    # Bars that begin where others end.
    left = [getattr(patch, "get_x", float)() for patch in axes.patches]
    stacked = _is_across(axes) and any(left)
    layout |= {"shapes": shapes, "barmode": "stack" if stacked else "group"}
    return {"data": data, "layout": layout}


def _is_across(axes: Axes) -> bool:
    return any(
        getattr(one, "orientation", "") == "horizontal" for one in axes.containers
    )


def _axis(axes: Axes, which: str) -> dict[str, Any]:
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    found: dict[str, Any] = {
        "title": {"text": axis.label.get_text()},
        "automargin": True,
        "zeroline": False,
        "showticklabels": len(axis.get_ticklocs()) > 0,
    }
    if axes.images:
        found |= {"type": "category", "showgrid": False}
    if axis.get_scale() == "log":
        return found | {"type": "log"}
    named = which == "y" and (_is_across(axes) or axes.images)
    # Names of bars, and a map's rows, are placed by Plotly; the first is on top.
    return found | ({"autorange": "reversed"} if named else {"range": [low, high]})


def _map(found: numbers.Cells) -> dict[str, Any]:
    signed = np.nanmin(found.values, initial=0) < 0
    # As `figures.heat` has it: nothing is drawn at 0.
    blue, orange = COLOURS[:2]
    shades = [[0, orange], [0.5, f"{blue}00"], [1, blue]]
    top = float(np.nanmax(np.abs(found.values), initial=0)) or 1.0
    return {
        "type": "heatmap",
        "y": [str(row) for row in found.rows],
        "x": [str(column) for column in range(found.values.shape[1])],
        "z": [[None if np.isnan(v) else float(v) for v in row] for row in found.values],
        "colorscale": shades if signed else [[0, f"{blue}00"], [1, blue]],
        "zmin": -top if signed else 0.0,
        "zmax": top,
        "colorbar": {"title": {"text": found.label, "side": "right"}, "thickness": 14},
        "hoverongaps": False,
    }


def _trace(one: numbers.Series) -> dict[str, Any]:
    x, y = ([point[i] for point in one.points] for i in (0, 1))
    artist: Any = one.artist
    found: dict[str, Any] = {"x": x, "y": y, "name": one.name}
    found["showlegend"] = bool(one.name)
    if one.spread:
        along = "error_x" if one.kind == "across" else "error_y"
        found[along] = {"type": "data", "array": list(one.spread), "thickness": 1}
    if one.kind in ("bars", "across"):
        marker: dict[str, Any] = {"color": to_hex(artist.get_facecolor())}
        if hatch := artist.get_hatch():
            marker["pattern"] = {"shape": hatch[0]}
        found |= {"type": "bar", "marker": marker}
        return found | ({"orientation": "h"} if one.kind == "across" else {})
    if one.kind == "points":
        colour = to_hex(artist.get_facecolor()[0])
        return found | {
            "type": "scatter",
            "mode": "markers",
            "marker": {"color": colour},
        }
    mode = "lines+markers" if artist.get_marker() not in ("", "None") else "lines"
    return found | {"type": "scatter", "mode": mode, "line": _line(artist)}


def _line(artist: Any) -> dict[str, Any]:
    dash = _DASHES.get(artist.get_linestyle(), "solid")
    return {"color": to_hex(artist.get_color()), "dash": dash}


def _level(one: numbers.Series) -> dict[str, Any]:
    """A line across the whole chart."""
    value = one.points[0][1]
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": _line(one.artist),
        "name": one.name,
        "showlegend": bool(one.name),
    }


def _bands(axes: Axes) -> list[dict[str, Any]]:
    """One standard deviation on either side of lines."""
    found = []
    for band in axes.collections:
        if isinstance(band, PolyCollection):
            corners = np.asarray(band.get_paths()[0].vertices)
            found.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": corners[:, 0].tolist(),
                    "y": corners[:, 1].tolist(),
                    "fill": "toself",
                    "fillcolor": to_hex(tuple(np.asarray(band.get_facecolor())[0])),
                    "opacity": 0.15,
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                }
            )
    return found
