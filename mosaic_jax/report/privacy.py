"""What studies claim of their privacy, what attacks found, and what it costs."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mosaic_jax.report import figures, html
from mosaic_jax.report.html import FigureFolder
from mosaic_jax.report.runs import FINAL, Groups, SavedRun

# The part of a sweep's cell that says epsilon.
_CELL = re.compile(r"privacy\.epsilon=[^,]*,?")


def told(run: SavedRun) -> Markup:
    """One sentence: accuracy, epsilon as it is claimed, and what attacks show."""
    claimed, shown = epsilon(run), lower(run)
    whose = run.summary.privacy.get("of")
    if claimed is None and shown is None:
        return Markup()
    accuracy = run.summary.test_accuracy.get(FINAL)
    parts = [] if accuracy is None else [f"Test accuracy {100 * accuracy:.2f} %"]
    parts.append(
        "no epsilon is claimed"
        if claimed is None
        else f"epsilon at most {claimed:.3g} is claimed for {whose}"
    )
    if shown is not None:
        parts.append(
            f"planted images show that it is at least {shown:.3g}, with 95 % confidence"
        )
    text = "; ".join(parts)
    return html.paragraph(f"{text[0].upper()}{text[1:]}.")


def epsilon(run: SavedRun) -> float | None:
    """The most that any client's images are claimed to be told of; None: no claim."""
    found = run.summary.privacy.get("epsilon")
    return max(found) if found else None


def lower(run: SavedRun) -> float | None:
    """The best bound of all attacks on all clients together; None: there is none.

    It holds with 95 %, as the bounds that it is the best of all do together.
    """
    found = [
        bound
        for row in run.summary.leakage
        if row["client"] is None
        # Runs of before do not have it.
        and (bound := row.get("epsilon_lower_together")) is not None
    ]
    return max(found, default=None)


def trade_off(groups: Groups, folder: FigureFolder) -> Markup:
    """Accuracy against epsilon, and the claims beside the bounds.

    Nothing where no study is private and none was attacked.

    Args:
      groups: of `runs.collect`.
      folder: that gets the figure as PNG.
    """
    runs = [run for group in groups.values() for run in group]
    if all(epsilon(run) is None and lower(run) is None for run in runs):
        return Markup()
    rows = [_row(name, group) for name, group in groups.items()]
    head = ["study", "epsilon claimed", "shown at least", "could show"]
    head += ["membership-inference AUC, highest", "test accuracy, %"]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = html.table(
        [head[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        "What is claimed, what attacks show, and what it costs; means over seeds, of"
        " what is shown the least, with 95 % confidence",
    )
    return html.joined([*_curve(groups, folder), table])


def _curve(groups: Groups, folder: FigureFolder) -> list[Markup]:
    """Accuracy against epsilon, if there are several."""
    lines: dict[str, dict[float, float]] = {}
    marks: dict[str, float] = {}
    for name, group in groups.items():
        rest = _CELL.sub("", name).strip(",")
        claimed, accuracy = _mean(map(epsilon, group)), _accuracy(group)
        if accuracy is None:
            continue
        if claimed is None:
            marks[", ".join(filter(None, (rest, "not private")))] = accuracy
        else:
            lines.setdefault(rest or "private", {})[claimed] = accuracy
    if not any(len(line) > 1 for line in lines.values()):
        return []
    drawn = figures.curves(
        {
            name: (np.array(sorted(line)), np.array([[line[x] for x in sorted(line)]]))
            for name, line in lines.items()
        },
        xlabel="epsilon",
        marks=marks,
        logarithmic=True,
    )
    caption = (
        "Final test accuracy against epsilon, mean over seeds; horizontal: without"
        " privacy."
    )
    return [html.side_by_side(folder.add("trade_off", drawn, caption))]


def _row(name: str, group: Sequence[SavedRun]) -> tuple[str, ...]:
    of_all = [
        [row for row in run.summary.leakage if row["client"] is None] for run in group
    ]
    accuracy = _accuracy(group)
    claimed, *values = (
        _mean(map(epsilon, group)),
        # A mean of bounds is none; the least holds as each of them does.
        _least(map(lower, group)),
        _mean(_most(rows, lambda row: row["epsilon_reach"]) for rows in of_all),
        _mean(_most(rows, _area) for rows in of_all),
        None if accuracy is None else 100 * accuracy,
    )
    shown = ["" if value is None else f"{value:.3g}" for value in values]
    return (name, "none" if claimed is None else f"{claimed:.3g}", *shown)


def _area(row: Mapping[str, Any]) -> float | None:
    return None if row["auc"] is None else row["auc"]["value"]


def _accuracy(group: Sequence[SavedRun]) -> float | None:
    return _mean(run.summary.test_accuracy.get(FINAL) for run in group)


def _most(
    rows: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float | None]
) -> float | None:
    return max((value for row in rows if (value := of(row)) is not None), default=None)


def _least(values: Iterable[float | None]) -> float | None:
    """Of all values; None where there is none, or one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return min(known) if known and len(known) == len(found) else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Of all values; None where there is none, or one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.mean(known) if known and len(known) == len(found) else None
