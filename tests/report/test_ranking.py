"""Who is ahead, and whether seeds can tell."""

import re

import numpy as np
import pytest
import scipy.stats

from mosaic_jax.report import ranking, runs
from tests.report import saved


def study(tmp_path, name, accuracies):
    found = []
    for seed, accuracy in accuracies.items():
        run = runs.read(saved.write_run(tmp_path / name / f"seed_{seed}", seed=seed))
        run.summary.test_accuracy["final"] = accuracy
        found.append(run)
    return found


def rows(text):
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    ][1:]


def test_differences_are_paired_by_hand(tmp_path):
    best, other = [0.9, 0.8, 0.7], [0.85, 0.74, 0.68]
    groups = {
        "other": study(tmp_path, "other", dict(enumerate(other))),
        "best": study(tmp_path, "best", dict(enumerate(best))),
    }
    text = ranking.ranking(groups)
    first, second = rows(text)
    assert first == ["1. best", "80.0 ± 10.0", "3", "", "", "", ""]
    points = 100 * (np.array(best) - other)
    tested = scipy.stats.ttest_rel(best, other)
    low, high = (100 * end for end in tested.confidence_interval(0.95))
    assert second[0] == "2. other" and second[3] == f"{points.mean():.1f}"
    assert second[4] == f"[{low:.1f}, {high:.1f}]"
    assert second[5] == f"{tested.pvalue:.2g}" and second[6] == "3 of 3"
    # 5, 6 and 2 points: an interval that holds 0.
    assert "it is ahead of none of the others. 3 seeds show large" in text


def test_what_is_sure_is_said(tmp_path):
    groups = {
        "a": study(tmp_path, "a", {0: 0.90, 1: 0.80, 2: 0.70}),
        "b": study(tmp_path, "b", {0: 0.50, 1: 0.41, 2: 0.30}),
    }
    assert "comparisons with a, it is ahead of b." in ranking.ranking(groups)


def test_single_seeds_say_nothing_of_the_spread(tmp_path):
    groups = {n: study(tmp_path, n, {0: x}) for n, x in (("a", 0.9), ("b", 0.8))}
    text = ranking.ranking(groups)
    assert rows(text)[1][3:] == ["10.0", "", "", "1 of 1"]
    assert "says nothing of the spread" in text
    groups["b"] = study(tmp_path, "c", {5: 0.8})
    assert rows(ranking.ranking(groups))[1][3] == "no split in common"
    groups["b"] = study(tmp_path, "d", {0: 0.8})
    groups["b"][0].summary.partition["sha256"] = "another"
    assert rows(ranking.ranking(groups))[1][3] == "no split in common"


def test_equal_differences_tell_nothing_of_their_spread(tmp_path):
    """Of 360 images, say: no p of 0, no interval without length."""
    groups = {
        "a": study(tmp_path, "a", {0: 0.90, 1: 0.80}),
        "b": study(tmp_path, "b", {0: 0.85, 1: 0.75}),
        "c": study(tmp_path, "c", {0: 0.70, 1: 0.69}),
    }
    text = ranking.ranking(groups)
    _, b, c = rows(text)
    assert b[3:] == ["5.0", "", "", "2 of 2"]
    assert c[4] and c[5]  # corrected for one comparison, not two
    assert "for 1 comparisons" in text
    del groups["c"]
    assert "with the same difference in every seed" in ranking.ranking(groups)


def test_holm_by_hand():
    found = ranking._holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": float("nan")})
    assert found["a"] == pytest.approx(0.03)
    assert found["c"] == pytest.approx(0.06)
    assert found["b"] == pytest.approx(0.06)  # no smaller than that before it
    assert np.isnan(found["d"])
