"""Accuracy against epsilon, and claims beside bounds."""

import types

import pytest

from mosaic_jax.report import html, privacy


def run(accuracy, epsilon=None, lower=None, auc=0.6):
    row = {
        "client": None,
        "epsilon_lower_together": lower,
        "epsilon_reach": None if lower is None else 4.0,
        "auc": {"value": auc},
    }
    summary = types.SimpleNamespace(
        privacy={}
        if epsilon is None
        else {"epsilon": [0.9 * epsilon, epsilon], "of": "what one image tells"},
        leakage=[] if lower is None else [row, row | {"client": 0, "auc": None}],
        test_accuracy={"final": accuracy},
    )
    return types.SimpleNamespace(summary=summary)


def test_a_sweep_draws_accuracy_against_epsilon(tmp_path):
    groups = {
        "privacy.epsilon=1.0": [run(0.2, 1.0, 0.0), run(0.4, 1.0, 0.2)],
        "privacy.epsilon=8.0": [run(0.5, 8.0, 0.5), run(0.7, 8.0, 0.7)],
        "privacy.epsilon=inf": [run(0.9, None, 2.0), run(0.9, None, 3.0)],
    }
    folder = html.FigureFolder(tmp_path)
    text = str(privacy.trade_off(groups, folder))
    assert (tmp_path / "trade_off.png").exists()
    assert "not private" in text
    for cell in (">0<", ">0.5<", ">2<", ">30<", ">60<", ">90<", ">none<"):
        assert cell in text, cell


def test_other_fields_of_the_grid_are_lines_of_their_own(tmp_path):
    groups = {
        f"privacy.epsilon={epsilon},local.steps={steps}": [run(0.1 * steps, epsilon)]
        for epsilon in (1.0, 8.0)
        for steps in (2, 4)
    }
    text = str(privacy.trade_off(groups, html.FigureFolder(tmp_path)))
    assert "local.steps=2" in text and "local.steps=4" in text


def test_nothing_is_shown_where_nothing_is_claimed_or_found(tmp_path):
    folder = html.FigureFolder(tmp_path)
    assert not privacy.trade_off({"a": [run(0.5)], "b": [run(0.6)]}, folder)
    assert not privacy.told(run(0.5))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            run(0.5, 8.0, 0.75),
            "Test accuracy 50.00 %; epsilon at most 8 is claimed for what one image"
            " tells; planted images show that it is at least 0.75, with 95 %"
            " confidence.",
        ),
        (run(0.5, 8.0), "Test accuracy 50.00 %; epsilon at most 8 is claimed"),
        (run(None, None, 2.0), "No epsilon is claimed; planted images show"),
    ],
)
def test_one_sentence_says_it(given, told):
    if given.summary.test_accuracy["final"] is None:
        given.summary.test_accuracy = {}
    assert told in str(privacy.told(given))
