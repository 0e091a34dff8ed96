"""Interactive charts: they draw what the figures draw."""

import csv
import sys

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.report import charts, figures, html, numbers

PLACES = np.array([1.0, 2.0, 3.0])
SEEDS = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.5]])
SPREAD = {"a": {"mean": 0.5, "spread": 0.1}, "b": {"mean": 0.25, "spread": 0.2}}
MAP = np.array([[1.0, -2.0], [0.0, np.nan]])
# Of every kind of figure one.
DRAWN = {
    "heat": lambda: figures.heat(MAP, xlabel="x", ylabel="y", label="n", fmt=".0f"),
    "label_counts": lambda: figures.label_counts(np.arange(60).reshape(30, 2)),
    "sizes": lambda: figures.sizes(np.arange(40)),
    "curves": lambda: figures.curves(
        {"a": (PLACES, SEEDS), "b": (PLACES, SEEDS[:1])}, xlabel="x"
    ),
    "bars": lambda: figures.bars(SPREAD),
    "per_class": lambda: figures.per_class({"a": SEEDS[0], "b": SEEDS[1]}),
    "many classes": lambda: figures.per_class({"a": np.linspace(0, 1, 30)}),
    "classes": lambda: figures.classes({"a": SEEDS[0], "b": SEEDS[1]}),
    "rates": lambda: figures.rates({"a": {"0.5": SPREAD["a"], "1.0": SPREAD["b"]}}),
    "progress": lambda: figures.progress({"loss": [100.0, 1.0, 0.1]}, [1, 2, 3]),
    "shares": lambda: figures.shares(
        {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, xlabel="MB"
    ),
    "scatter": lambda: figures.scatter(
        [1.0, 10.0], [0.1, 0.2], xlabel="x", ylabel="y", level=0.5
    ),
}


def points(chart):
    """Name and place of each point or bar, and of each cell of a map."""
    for trace in chart["data"]:
        if trace["type"] == "heatmap":
            for name, row in zip(trace["y"], trace["z"], strict=True):
                for column, value in zip(trace["x"], row, strict=True):
                    yield name, column, "nan" if value is None else f"{value:.6g}"
        elif trace.get("fill") != "toself":
            along = trace.get("error_x") or trace.get("error_y") or {}
            spread = [[f"{one:.6g}"] for one in along.get("array", [])]
            ends = spread or [[]] * len(trace["x"])
            for x, y, end in zip(trace["x"], trace["y"], ends, strict=True):
                told = [v if isinstance(v, str) else f"{v:.6g}" for v in (x, y)]
                yield trace["name"], *told, *end


@pytest.mark.parametrize("kind", DRAWN)
def test_charts_have_the_numbers_of_the_figure(kind):
    drawn = DRAWN[kind]()
    _, *rows = csv.reader(numbers.of(drawn).splitlines())
    found = list(points(charts.chart(drawn)))
    levels = charts.chart(drawn)["layout"].get("shapes", [])
    # A line across the chart has two ends in the table, and is no point of the chart.
    values = {f"{level['y0']:.6g}" for level in levels}
    kept = [tuple(row) for row in rows if not (levels and row[2] in values)]
    assert sorted(found) == sorted(kept)
    assert len(found) > 1


def test_levels_cross_the_whole_chart():
    drawn = figures.curves({"a": (PLACES, SEEDS)}, xlabel="x", marks={"teacher": 0.75})
    chart = charts.chart(drawn)
    (level,) = chart["layout"]["shapes"]
    assert (level["y0"], level["y1"], level["name"]) == (0.75, 0.75, "teacher")
    assert level["xref"] == "paper"
    # One band for the seeds, and their mean.
    assert [trace.get("fill") for trace in chart["data"]] == ["toself", None]


def test_bars_are_stacked_where_they_are_in_the_figure():
    assert charts.chart(DRAWN["shares"]())["layout"]["barmode"] == "stack"
    assert charts.chart(DRAWN["per_class"]())["layout"]["barmode"] == "group"
    assert charts.chart(DRAWN["rates"]())["layout"]["xaxis"]["type"] == "log"


def test_without_plotly_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(errors.ConfigError, match="pip install plotly"):
        html.FigureFolder(tmp_path / "figures", interactive=True)
    assert not (tmp_path / "figures").exists()


def test_text_that_speaks_of_charts_loads_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    text = html.paragraph('data-chart data-get <div class="chart" <figure')
    assert "<script" not in html.page("title", "lead", {"Text": text})
