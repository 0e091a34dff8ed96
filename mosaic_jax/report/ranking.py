"""Which of several studies is best, and whether their seeds can tell."""

import math
import statistics
from collections.abc import Mapping, Sequence

import scipy.stats
from markupsafe import Markup

from mosaic_jax.report import html
from mosaic_jax.report.runs import FINAL, Groups, SavedRun

# Of intervals and of the note.
LEVEL = 0.95
# Models by which a study counts, the first that it has.
_COUNTS = (FINAL, "personal")
_HEAD = [
    "study",
    "test accuracy, %",
    "seeds",
    "points below the first",
    "interval [95 %]",
    "p",
    "behind it in",
]


def ranking(groups: Groups) -> Markup:
    """A table from the best study down, with differences over common seeds.

    Differences are paired: each seed of a study with the same seed of the first, where
    both have the same split. Intervals and p are of Student's t for paired
    samples, p by Holm's correction for all studies that are compared with the first.
    """
    found = {name: _accuracies(group) for name, group in groups.items()}
    order = sorted(found, key=lambda name: -statistics.mean(_values(found[name])))
    first = found[order[0]]
    below = {name: _below(found[name], first) for name in order[1:]}
    corrected = _holm({name: _p(values) for name, values in below.items()})
    rows = []
    for rank, name in enumerate(order, start=1):
        values = _values(found[name])
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        mean = f"{100 * statistics.mean(values):.1f}{spread}"
        cells = ("", "", "", "")
        if name in below:
            cells = _cells(below[name], corrected[name])
        rows.append((f"{rank}. {name}", mean, len(values), *cells))
    body = html.table(_HEAD, rows, "Ranking by test accuracy")
    return body + html.paragraph(_note(order, below, corrected))


def _accuracies(group: Sequence[SavedRun]) -> dict[tuple[int, str], float]:
    """Test accuracy of what a study ends with, by its seed and its split's digest."""
    result = {}
    for run in group:
        test, split = run.summary.test_accuracy, run.summary.partition["sha256"]
        accuracy = next(test[name] for name in _COUNTS if name in test)
        result[run.summary.seed, split] = accuracy
    return result


def _values(found: Mapping[tuple[int, str], float]) -> list[float]:
    return list(found.values())


def _below(
    values: Mapping[tuple[int, str], float], first: Mapping[tuple[int, str], float]
) -> list[float]:
    """Points below the first study, of each seed and split that both have."""
    return [100 * (first[which] - values[which]) for which in values if which in first]


def _p(points: Sequence[float]) -> float:
    """Of differences as large as these if there were none; NaN: they cannot tell."""
    if not _tell(points):
        return math.nan
    size = abs(statistics.mean(points)) / _error(points)
    return float(2 * scipy.stats.t.sf(size, len(points) - 1))


def _tell(points: Sequence[float]) -> bool:
    """Whether differences have a spread to be compared with.

    Of few test images two seeds may differ by just as many, by chance.
    """
    return len(points) > 1 and statistics.stdev(points) > 1e-9


def _error(points: Sequence[float]) -> float:
    """Standard error of their mean."""
    return statistics.stdev(points) / math.sqrt(len(points))


def _holm(values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction of p by name; those that are NaN stay so and do not count."""
    result = dict(values)
    known = sorted((p, name) for name, p in values.items() if not math.isnan(p))
    highest = 0.0
    for i, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - i) * p))
        result[name] = highest
    return result


def _cells(points: Sequence[float], p: float) -> tuple[str, str, str, str]:
    if not points:
        return ("no split in common", "", "", "")
    mean = f"{statistics.mean(points):.1f}"
    behind = f"{sum(value > 0 for value in points)} of {len(points)}"
    if not _tell(points):
        return (mean, "", "", behind)
    reach = _error(points) * scipy.stats.t.ppf((1 + LEVEL) / 2, len(points) - 1)
    low, high = statistics.mean(points) - reach, statistics.mean(points) + reach
    return (mean, f"[{low:.1f}, {high:.1f}]", f"{p:.2g}", behind)


def _note(
    order: Sequence[str],
    below: Mapping[str, Sequence[float]],
    corrected: Mapping[str, float],
) -> str:
    """What the ranking may be taken for."""
    tested = [name for name in order[1:] if not math.isnan(corrected[name])]
    if not tested:
        return (
            "Of a single seed each, of splits that differ, or with the same difference"
            " in every seed: a ranking of runs, which says nothing of the spread"
            " between seeds."
        )
    sure = [name for name in tested if corrected[name] < 1 - LEVEL]
    clear = f"{', '.join(sure)}" if sure else "none of the others"
    seeds = min(len(below[name]) for name in tested)
    few = (
        f" {seeds} seeds show large differences alone; a test of them asks for"
        " differences that are about normal."
        if seeds < 10
        else ""
    )
    return (
        f"Differences are paired over seeds with the same split; what else differs is"
        f" under Differences in settings. At the level of {1 - LEVEL:.2f}, corrected by"
        f" Holm for {len(tested)} comparisons with {order[0]}, it is ahead of"
        f" {clear}.{few}"
    )
