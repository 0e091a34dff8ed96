"""The pictures of a run, as matplotlib figures from plain arrays."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")
# Okabe and Ito's palette stays apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def _heat(
    values: np.ndarray, *, xlabel: str, ylabel: str, label: str, fmt: str
) -> Figure:
    """Annotated heat map of `values` [rows, columns]."""
    rows, columns = values.shape
    figure = Figure(
        figsize=(2 + 0.5 * columns, 1.5 + 0.35 * rows), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    figure.colorbar(image, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if columns <= 20:
        axes.set_xticks(range(columns))
    if rows <= 40:
        axes.set_yticks(range(rows))
    if values.size <= 400:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > middle else "white"
            text = "" if np.isnan(value) else format(value, fmt)
            axes.text(column, row, text, ha="center", va="center", color=colour, size=8)
    return figure


def label_counts(label_count: np.ndarray) -> Figure:
    """Images per client and class, [C, K]."""
    return _heat(
        label_count.astype(float),
        xlabel="class",
        ylabel="client",
        label="images",
        fmt=".0f",
    )


def expert_classes(accuracy: np.ndarray) -> Figure:
    """Test accuracy of each expert [K] on each class [K]."""
    return _heat(
        accuracy, xlabel="class", ylabel="expert", label="test accuracy", fmt=".2f"
    )


def accuracy_over_rounds(
    curves: dict[str, Sequence[tuple[int, float]]], marks: dict[str, float]
) -> Figure:
    """Accuracy of the global model over rounds, by stage; other models as lines.

    Args:
      curves: stage to (round, accuracy) pairs, rounds counted over the whole study.
      marks: model to accuracy, drawn as labelled horizontal lines.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = iter(COLOURS * 3)
    for name, points in curves.items():
        rounds, values = zip(*points, strict=True)
        axes.plot(rounds, values, marker="o", label=name, color=next(colours))
    styles = iter(("--", ":", "-.") * 3)
    for name, value in marks.items():
        axes.axhline(
            value, linestyle=next(styles), label=name, color=next(colours), alpha=0.9
        )
    axes.set(xlabel="federated round", ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def per_class(accuracy: dict[str, np.ndarray]) -> Figure:
    """Accuracy within each class [K], a bar per model."""
    num_classes = len(next(iter(accuracy.values())))
    width = 0.8 / len(accuracy)
    figure = Figure(figsize=(2 + 0.8 * min(num_classes, 25), 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(accuracy.items()):
        place = np.arange(num_classes) - 0.4 + (i + 0.5) * width
        axes.bar(place, values, width, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set(xlabel="class", ylabel="test accuracy", ylim=(0, 1.02))
    if num_classes <= 25:
        axes.set_xticks(range(num_classes))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def generated_beside_real(
    generated: np.ndarray, real: np.ndarray, titles: Sequence[str]
) -> Figure:
    """A row per client: its real images on the left, generated ones on the right.

    Args:
      generated: [C, G, H, W, D] uint8, the same noise in each row.
      real: [C, R, H, W, D] uint8.
      titles: C row labels.
    """
    rows, count = generated.shape[:2]
    columns = count + real.shape[1]
    figure = Figure(
        figsize=(2 + 0.55 * columns, 0.6 + 0.62 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column, image in enumerate([*real[row], *generated[row]]):
            cell = axes[row][column]
            cell.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
            colour = COLOURS[0] if column < real.shape[1] else COLOURS[1]
            for spine in cell.spines.values():
                spine.set_color(colour)
        axes[row][0].set_ylabel(
            titles[row], rotation=0, ha="right", va="center", size=8
        )
    axes[0][0].set_title("real", loc="left", color=COLOURS[0])
    axes[0][real.shape[1]].set_title("generated", loc="left", color=COLOURS[1])
    return figure


def bars(values: dict[str, dict[str, float]]) -> Figure:
    """A bar per name, {"mean", "spread"} accuracies, with whiskers."""
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    mean = [value["mean"] for value in values.values()]
    spread = [value["spread"] for value in values.values()]
    axes.barh(list(values), mean, xerr=spread, color=COLOURS[5], capsize=4)
    for row, (middle, width) in enumerate(zip(mean, spread, strict=True)):
        axes.text(
            middle + width + 0.01, row, f"{100 * middle:.1f}", va="center", size=9
        )
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy", xlim=(0, 1.1))
    axes.grid(axis="x", alpha=0.3)
    return figure


def curves(lines: dict[str, tuple[np.ndarray, np.ndarray]], *, xlabel: str) -> Figure:
    """Accuracy of each name: places [R] and values [seeds, R], mean and spread."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles = ("-", "--", ":")
    for i, (name, (place, values)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=len(values) > 1)
        style = styles[i // len(COLOURS) % len(styles)]
        axes.plot(place, mean, style, label=name, color=colour, marker=".")
        if len(values) > 1:
            axes.fill_between(
                place, mean - spread, mean + spread, color=colour, alpha=0.12
            )
    axes.set(xlabel=xlabel, ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def rates(accuracy: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Accuracy {"mean", "spread"} by rate, for each name."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, found) in enumerate(accuracy.items()):
        places = sorted(found, key=float)
        axes.errorbar(
            [float(rate) for rate in places],
            [found[rate]["mean"] for rate in places],
            [found[rate]["spread"] for rate in places],
            label=name,
            color=COLOURS[i % len(COLOURS)],
            linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
            marker=".",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="share of channels", ylabel="test accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def classes(accuracy: dict[str, np.ndarray]) -> Figure:
    """Accuracy of each name within each class [K], as a map."""
    figure = _heat(
        np.stack(list(accuracy.values())),
        xlabel="class",
        ylabel="",
        label="test accuracy",
        fmt=".2f",
    )
    figure.axes[0].set_yticks(range(len(accuracy)), list(accuracy))
    return figure


def seconds(stages: dict[str, Any]) -> Figure:
    """Seconds spent in each stage."""
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(stages)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(list(stages), list(stages.values()), color=COLOURS[0])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    axes.margins(x=0.12)
    return figure
