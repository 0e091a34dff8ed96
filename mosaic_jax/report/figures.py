"""The pictures of a run, as matplotlib figures from plain arrays."""

import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from mosaic_jax.core import files

# Okabe and Ito's palette stays apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Drawn in these; on a page they follow its theme, by the names of its style sheet.
INK, LINES = "#1b1b1c", "#8c8c8d"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": LINES,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.alpha": 0.4,
    "grid.color": LINES,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mosaic_jax",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
# In inches: a figure's width, and the side of an image among others.
WIDTH, IMAGE_SIDE = 5.4, 0.45
MARKERS = "os^Dv<>"
# Of a loop's measures.
MOST_POINTS = 200
# Of bars, once the colours are used up.
HATCHES = ("", "//", "..", "xx")


# Around what draws: a user's own figures, in the same notebook, keep theirs.
_styled = matplotlib.rc_context(STYLE)


@_styled
def new(height: float = 3.4, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure, as wide as a column of a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# What a figure can be saved as, by the end of the file's name.
SUFFIXES = (".pdf", ".png", ".svg")


@_styled
def save(figure: Figure, path: pathlib.Path) -> None:
    """Write a picture of the kind that the name's end says, whole or not at all."""
    buffer = io.BytesIO()
    kind = path.suffix[1:].lower()
    figure.savefig(buffer, format=kind, dpi=110, facecolor="white")
    files.write_bytes(path, buffer.getvalue())


@_styled
def svg(figure: Figure, label: str) -> Markup:
    """Inline SVG whose ink follows the page, read out as `label`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        lambda match: (
            f'<svg {match[1]} role="img" aria-label="{escape(label)}"'
            ' xmlns:xlink="http://www.w3.org/1999/xlink">'
        ),
        text,
        count=1,
    )
    text = text.replace(INK, "currentColor").replace(LINES, "var(--line)")
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--c{i})")
    return Markup(text)


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:
        columns = max(1, min(columns, 54 // (5 + max(map(len, names)))))
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)


def _accuracy_axis(axes: Axes) -> None:
    axes.set(ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(visible=True)


def _line_style(i: int) -> dict[str, Any]:
    """Names differ by colour and marker, in black and white too."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3],
        "marker": MARKERS[i % len(MARKERS)],
    }


@_styled
def heat(
    values: np.ndarray,
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    fmt: str,
    rows: Sequence[str] = (),
) -> Figure:
    """Heat map; a small one carries its numbers.

    Args:
      values: [rows, columns]; NaN where there is none.
      xlabel: what a column is.
      ylabel: what a row is.
      label: what a number is.
      fmt: of the numbers, as `format` takes it.
      rows: their names; numbers where none are given.
    """
    height, width = values.shape
    figure, axes = new(
        width=min(7.5, max(4.4, 1.7 + 0.42 * width)),
        height=min(6.5, max(2.2, 1.0 + 0.32 * height)),
    )
    top = float(np.nanmax(np.abs(values), initial=0)) or 1.0
    low = -top if np.nanmin(values, initial=0) < 0 else 0.0
    image = axes.imshow(
        values,
        cmap=_shades(signed=low < 0),
        vmin=low,
        vmax=top,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(image, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if width <= 20:
        axes.set_xticks(range(width))
    if rows:
        axes.set_yticks(range(height), rows)
    elif height <= 20:
        axes.set_yticks(range(height))
    if width <= 12 and height <= 25:
        for (row, column), value in np.ndenumerate(values):
            text = "" if np.isnan(value) else format(value, fmt)
            # Zeros would be most of what one sees.
            if text.strip("-0."):
                colour = "white" if abs(value) > top / 2 else INK
                axes.text(
                    *(column, row, text), ha="center", va="center", color=colour, size=8
                )
    return figure


def _shades(*, signed: bool) -> ListedColormap:
    """Blue, the stronger the more, from nothing at 0; below that orange."""
    strength = np.linspace(-1.0 if signed else 0.0, 1.0, 257)
    blue, orange = (to_rgb(COLOURS[i]) for i in (0, 1))
    rgb = np.where(strength[:, None] >= 0, blue, orange)
    return ListedColormap(np.concatenate([rgb, np.abs(strength)[:, None]], axis=1))


@_styled
def label_counts(label_count: np.ndarray) -> Figure:
    """Images per client and class, [C, K]; many clients are sorted by main class."""
    ylabel = "client"
    if len(label_count) > 25:
        order = np.lexsort((-label_count.sum(axis=1), label_count.argmax(axis=1)))
        label_count, ylabel = label_count[order], "clients, by their main class"
    figure = heat(
        label_count.astype(float),
        xlabel="class",
        ylabel=ylabel,
        label="images",
        fmt=".0f",
    )
    if ylabel != "client":
        figure.axes[0].set_yticks([])
    return figure


@_styled
def sizes(size: np.ndarray) -> Figure:
    """How many clients hold how many images, [C]."""
    figure, axes = new(2.6)
    axes.hist(size, bins=min(40, max(5, len(size) // 5)), color=COLOURS[0])
    axes.set(xlabel="training images", ylabel="clients")
    return figure


@_styled
def curves(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    xlabel: str,
    marks: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Accuracy of each name as a line, with a band where there are several seeds.

    Args:
      lines: by name, places [R] and accuracies [seeds, R]; the band is one standard
        deviation on either side of the mean.
      xlabel: what a place is.
      marks: accuracies by name, drawn as horizontal lines.
      logarithmic: whether the axis of places is; then each has its tick.
    """
    figure, axes = new(3.8)
    for i, (name, (place, values)) in enumerate(lines.items()):
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=len(values) > 1)
        style = _line_style(i)
        axes.plot(place, mean, label=name, markersize=4, **style)
        if len(values) > 1:
            axes.fill_between(
                place, mean - spread, mean + spread, color=style["color"], alpha=0.15
            )
    for i, (name, value) in enumerate((marks or {}).items(), start=len(lines)):
        colour, style = COLOURS[i % len(COLOURS)], ("--", ":", "-.")[i % 3]
        axes.axhline(value, linestyle=style, label=name, color=colour)
    axes.set(xlabel=xlabel)
    if logarithmic:
        ticks = np.unique(np.concatenate([place for place, _ in lines.values()]))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    _accuracy_axis(axes)
    _legend(figure, axes)
    return figure


@_styled
def bars(values: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar per name, {"mean", "spread"} accuracies, with whiskers."""
    figure, axes = new(0.9 + 0.34 * len(values))
    mean = [value["mean"] for value in values.values()]
    spread = [value["spread"] for value in values.values()]
    axes.barh(
        list(values), mean, xerr=spread, color=COLOURS[5], ecolor=LINES, capsize=4
    )
    for row, (middle, width) in enumerate(zip(mean, spread, strict=True)):
        axes.text(
            middle + width + 0.02, row, f"{100 * middle:.1f}", va="center", size=9
        )
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy", xlim=(0, 1.19))
    axes.grid(visible=True, axis="x")
    return figure


@_styled
def per_class(accuracy: Mapping[str, np.ndarray]) -> Figure:
    """Accuracy within each class [K]: bars, or lines over many sorted classes."""
    num_classes = len(next(iter(accuracy.values())))
    figure, axes = new(3.6, width=WIDTH if num_classes <= 12 else 7.5)
    for i, (name, values) in enumerate(accuracy.items()):
        colour = COLOURS[i % len(COLOURS)]
        if num_classes > 25:
            # Classes without test images are NaN.
            shown = np.sort(values[~np.isnan(values)])[::-1]
            dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
            axes.plot(shown, dashes, label=name, color=colour)
            continue
        width = 0.8 / len(accuracy)
        place = np.arange(num_classes) - 0.4 + (i + 0.5) * width
        hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
        axes.bar(place, values, width, label=name, color=colour, hatch=hatch)
    if num_classes <= 25:
        axes.set(xlabel="class")
        axes.set_xticks(range(num_classes))
    else:
        axes.set(xlabel="classes, best first for each model")
    _accuracy_axis(axes)
    _legend(figure, axes)
    return figure


@_styled
def classes(accuracy: Mapping[str, np.ndarray]) -> Figure:
    """Accuracy of each name within each class [K], as a map."""
    return heat(
        np.stack(list(accuracy.values())),
        xlabel="class",
        ylabel="",
        label="test accuracy",
        fmt=".2f",
        rows=list(accuracy),
    )


@_styled
def rates(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Accuracy {"mean", "spread"} by rate, for each name."""
    figure, axes = new(3.8)
    for i, (name, found) in enumerate(accuracy.items()):
        places = sorted(found, key=float)
        axes.errorbar(
            [float(rate) for rate in places],
            [found[rate]["mean"] for rate in places],
            [found[rate]["spread"] for rate in places],
            label=name,
            capsize=3,
            **_line_style(i),
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="share of channels")
    _accuracy_axis(axes)
    _legend(figure, axes)
    return figure


@_styled
def progress(lines: Mapping[str, Sequence[float]], step: Sequence[float]) -> Figure:
    """What a training loop measured.

    Args:
      lines: of each measure by name, its value after each of `step`.
      step: numbers of steps, [N].
    """
    figure, axes = new(2.3, width=3.2)
    kept = slice(None, None, -(-len(step) // MOST_POINTS))
    for i, (name, values) in enumerate(lines.items()):
        style: dict[str, Any] = _line_style(i) | {"marker": ""}
        axes.plot(step[kept], values[kept], label=name, **style)
    every = [value for values in lines.values() for value in values]
    if min(every) > 0 and max(every) > 30 * min(every):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="" if len(lines) > 1 else next(iter(lines)))
    axes.grid(visible=True)
    _legend(figure, axes, 2)
    return figure


@_styled
def shares(
    parts: Mapping[str, Mapping[str, float]], *, xlabel: str, fmt: str = ".0f"
) -> Figure:
    """A bar per name, divided into its named parts.

    Args:
      parts: by the bar's name, the length of each part by its own name.
      xlabel: what a length is.
      fmt: of the sums, as `format` takes it.
    """
    names = list(parts)
    kinds = list(dict.fromkeys(kind for found in parts.values() for kind in found))
    figure, axes = new(1.4 + 0.34 * len(names) + 0.2 * (len(kinds) // 3))
    left = np.zeros(len(names))
    for i, kind in enumerate(kinds):
        value = np.array([found.get(kind, 0.0) for found in parts.values()])
        axes.barh(
            names,
            value,
            left=left,
            label=kind,
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i // len(COLOURS) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
        )
        left += value
    for row, value in enumerate(left):
        axes.text(value, row, f" {value:{fmt}}", va="center", size=9)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel)
    axes.margins(x=0.15)
    _legend(figure, axes)
    return figure


@_styled
def scatter(
    x: Sequence[float], y: Sequence[float], *, xlabel: str, ylabel: str, level: float
) -> Figure:
    """Points, and a horizontal line.

    Args:
      x: of each point; on a logarithmic axis where all are positive.
      y: of each point; the axis is that of a share where all are in [0, 1].
      xlabel: what `x` is.
      ylabel: what `y` is.
      level: of the line.
    """
    figure, axes = new(3.0)
    axes.axhline(level, color=LINES, linestyle="--")
    axes.scatter(x, y, color=COLOURS[0], s=18)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if all(0 <= value <= 1 for value in (*y, level)):
        axes.set(ylim=(0, 1.02))
    if all(value > 0 for value in x):
        axes.set_xscale("log")
    axes.grid(visible=True)
    return figure


@_styled
def strips(columns: Mapping[str, Sequence[np.ndarray]], names: Sequence[str]) -> Figure:
    """Rows of images, one column beside the other.

    Args:
      columns: by its heading, of each row an image [H, W, D] uint8, D of 1 or 3; in a
        column all are of one size.
      names: of the rows.
    """
    joined = {name: np.concatenate(list(rows)) for name, rows in columns.items()}
    # In sides of an image: rows of several are as wide as these, and no column is
    # narrower than its heading.
    widths = [
        max(rows[0].shape[1] / rows[0].shape[0], 0.2 * len(name))
        for name, rows in columns.items()
    ]
    margin = 0.5 + 0.09 * max(map(len, names))
    size = (margin + IMAGE_SIDE * sum(widths), 0.5 + IMAGE_SIDE * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for place, (name, pixels) in zip(axes, joined.items(), strict=True):
        grey = pixels.shape[-1] == 1
        shown = pixels[..., 0] if grey else pixels
        place.imshow(shown, cmap="gray", vmin=0, vmax=255)
        place.set_title(name, size=9)
        place.set(xticks=[], yticks=[])
    height = len(next(iter(joined.values()))) / len(names)
    middles = [height * (row + 0.5) for row in range(len(names))]
    axes[0].set_yticks(middles, names)
    return figure
