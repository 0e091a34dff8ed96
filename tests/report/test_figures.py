import subprocess
import sys

from mosaic_jax.report import figures


def test_ink_follows_the_theme():
    drawn = figures.bars({"a": {"mean": 0.5, "spread": 0.1}})
    text = figures.svg(drawn, "label")
    assert figures.INK not in text and "currentColor" in text
    assert figures.COLOURS[5].lower() not in text and "var(--c5)" in text


def test_shares_have_the_axis_of_shares():
    def draw(y):
        drawn = figures.scatter([1, 10], y, xlabel="x", ylabel="y", level=0.5)
        return drawn.axes[0]

    assert draw([0.1, 0.2]).get_ylim() == (0, 1.02)
    assert draw([0.1, 20.0]).get_ylim()[1] > 20


def test_a_users_own_figures_are_left_alone():
    """Neither their back end nor their style changes, before or after a drawing."""
    code = """
import matplotlib
matplotlib.use("svg")
before = dict(matplotlib.rcParams)
from mosaic_jax.report import figures
figures.svg(figures.bars({"a": {"mean": 0.5, "spread": 0.1}}), "label")
assert dict(matplotlib.rcParams) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
