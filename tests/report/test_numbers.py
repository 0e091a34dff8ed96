"""The numbers of figures, as files."""

import numpy as np

from mosaic_jax.report import figures, numbers


def lines(drawn):
    return numbers.of(drawn).splitlines()


def test_bars_have_their_names():
    drawn = figures.bars({"a": {"mean": 0.5, "spread": 0.1}})
    assert lines(drawn) == ["series,test accuracy,value,spread", ",0.5,a,0.1"]
    drawn = figures.shares({"s": {"x": 1.0, "y": 2.0}}, xlabel="MB")
    assert lines(drawn) == ["series,MB,value", "x,1,s", "y,2,s"]
    drawn = figures.per_class({"m": np.array([0.1, 0.2]), "n": np.array([0.3, 0.4])})
    assert lines(drawn)[1:] == ["m,0,0.1", "m,1,0.2", "n,0,0.3", "n,1,0.4"]


def test_lines_and_points():
    drawn = figures.rates({"a": {"0.5": {"mean": 0.25, "spread": 0.1}}})
    assert lines(drawn)[1:] == ["a,0.5,0.25,0.1"]
    drawn = figures.scatter([1, 2], [0.1, 0.2], xlabel="x", ylabel="y", level=0.5)
    assert lines(drawn)[-2:] == [",1,0.1", ",2,0.2"]


def test_maps():
    values = np.array([[1, 2.0], [0, np.nan]])
    drawn = figures.heat(
        values, xlabel="x", ylabel="y", label="n", fmt=".0f", rows=["u", "v"]
    )
    assert lines(drawn) == ["y,x,n", "u,0,1", "u,1,2", "v,0,0", "v,1,nan"]


def test_zeros_are_not_written_into_maps():
    values = np.array([[0.0, 3.0], [-2.0, 0.001]])
    drawn = figures.heat(values, xlabel="x", ylabel="y", label="n", fmt=".2f")
    shown = [text.get_text() for text in drawn.axes[0].texts]
    assert shown == ["3.00", "-2.00"]
    # Nothing is drawn at 0; what is below it has another colour.
    shades = drawn.axes[0].images[0].cmap
    assert shades(0.5)[3] == 0 and shades(0.0)[:3] != shades(1.0)[:3]


def test_whiskers_are_the_last_column():
    drawn = figures.bars(
        {"a": {"mean": 0.5, "spread": 0.1}, "b": {"mean": 0.25, "spread": 0.0}}
    )
    table = lines(drawn)
    assert table[0] == "series,test accuracy,value,spread"
    assert table[1:] == [",0.5,a,0.1", ",0.25,b,0"]
