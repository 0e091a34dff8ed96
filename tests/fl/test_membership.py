"""Rates, likelihood ratios and bounds: by hand, by formulas and by known mechanisms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mosaic_jax.fl import membership


def test_confidence_is_the_logarithm_of_the_odds():
    logits = jnp.array([[1.0, 2.0, 4.0], [50.0, -50.0, 0.0]])
    label = jnp.array([0, 0])
    p = jax.nn.softmax(logits)[0, 0]
    found = membership.confidence(logits, label)
    assert found[0] == pytest.approx(float(jnp.log(p / (1 - p))), abs=1e-5)
    # Where p is 1 in float32 there is still an order.
    assert found[1] == pytest.approx(50.0, abs=1e-4)


def test_true_positives_by_hand():
    other = np.arange(1000.0)
    # 10 of 1000 others may score higher: those above 989.
    member = np.array([989.0, 989.5, 990.0, 2000.0])
    found = membership.true_positives(member, other, 0.01)
    assert found is not None and found["value"] == 0.75
    low, high = stats.binomtest(3, 4).proportion_ci(method="exact")
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert np.mean(other > 989) == 0.01


def test_a_rate_that_so_few_others_cannot_tell_is_none():
    assert membership.true_positives(np.ones(5), np.zeros(99), 0.01) is None
    assert membership.true_positives(np.ones(5), np.zeros(100), 0.01) is not None
    assert membership.true_positives(np.ones(0), np.zeros(100), 0.01) is None


def test_a_model_that_says_the_same_of_all_finds_nobody():
    found = membership.true_positives(np.zeros(50), np.zeros(200), 0.01)
    assert found is not None and found["value"] == 0
    assert found["low"] == 0 and found["high"] < 0.1


def test_the_ends_of_intervals():
    assert membership.interval(0, 10)[0] == 0
    assert membership.interval(10, 10)[1] == 1
    # 1 - (alpha / 2)^(1 / n), and its mirror image.
    assert membership.interval(0, 10)[1] == pytest.approx(1 - 0.025**0.1)
    assert membership.interval(10, 10)[0] == pytest.approx(0.025**0.1)


@pytest.mark.parametrize("count", [2, 7, 40])
def test_every_image_is_in_half_of_the_shadows(count):
    found = membership.halves(np.random.RandomState(0), 8, count)
    assert found.shape == (8, count)
    assert (found.sum(axis=0) == 4).all()
    assert set(found.sum(axis=1)) <= {count // 2, (count + 1) // 2}
    assert count == 2 or len(np.unique(found, axis=0)) > 2


def test_likelihood_ratio_of_normal_scores_is_the_formula():
    """Many shadows, known deviations: the ratio of the two normal densities."""
    np_rng = np.random.RandomState(0)
    inside = membership.halves(np_rng, 4000, 3)
    means = np.where(inside, 2.0, [0.0, -1.0, 1.0])
    shadow = means + np_rng.randn(*inside.shape) * np.where(inside, 0.5, 1.5)
    score = np.array([1.0, 2.0, 1.5])
    expected = stats.norm.logpdf(score, 2.0, 0.5) - stats.norm.logpdf(
        score, [0.0, -1.0, 1.0], 1.5
    )
    found = membership.likelihood_ratio(score, shadow, inside)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)


def test_likelihood_ratio_sees_past_how_hard_an_image_is():
    """Scores are of the image far more than of membership: a threshold fails."""
    np_rng = np.random.RandomState(1)
    count, shadows = 400, 8
    hard, member = 10 * np_rng.randn(count), np_rng.rand(count) < 0.5
    inside = membership.halves(np_rng, shadows, count)
    shadow = hard + 2.0 * inside + 0.5 * np_rng.randn(shadows, count)
    score = hard + 2.0 * member + 0.5 * np_rng.randn(count)
    ratio = membership.likelihood_ratio(score, shadow, inside)
    assert np.mean((ratio > 0) == member) > 0.95
    order = np.argsort(score) >= count / 2
    assert np.mean(order == member) < 0.7


def test_guesses_by_hand():
    score = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 6.0, 7.0])
    inside = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    # Surest: 7 (wrong) and 0 (right); then 6 and 1 as well (both right).
    assert membership.guesses(score, inside, 0.25) == (2, 1)
    assert membership.guesses(score, inside, 0.5) == (4, 3)
    # In order: 0 0 1 | 0 ... : lower half says no, upper half yes.
    assert membership.guesses(score, inside, 1.0) == (8, 6)
    assert membership.guesses(score[:1], inside[:1], 1.0) == (0, 0)


def test_all_right_by_the_formula():
    """Without delta: q^r = 0.05 for q = e^epsilon / (1 + e^epsilon)."""
    chance = 0.05 ** (1 / 64)
    expected = math.log(chance / (1 - chance))
    assert membership.bound(100, [(64, 64)], 0.0) == pytest.approx(expected)


def test_p_value_without_delta_is_a_binomial_tail():
    for epsilon in (0.0, 1.0, 3.0):
        chance = math.exp(epsilon) / (1 + math.exp(epsilon))
        expected = stats.binomtest(30, 40, chance, alternative="greater").pvalue
        found = membership.p_value(64, 40, 30, epsilon, 0.0)
        assert found == pytest.approx(expected)


def test_delta_costs_by_the_theorem():
    """By hand: of 2 guesses, both right, at epsilon 0 the counts are 1/4, 1/2, 1/4."""
    # P[v > B >= v - i] / i: 1/2 for i = 1, (1/2 + 1/4) / 2 for i = 2.
    expected = 0.25 + 2 * 10 * 1e-3 * 0.5
    assert membership.p_value(10, 2, 2, 0.0, 1e-3) == pytest.approx(expected)
    # Never more than certain, and more delta never speaks for more.
    assert membership.p_value(10, 2, 2, 0.0, 0.9) == 1
    bounds = [membership.bound(320, [(80, 79)], d) for d in (0.0, 1e-5, 1e-3, 1e-1)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[-1]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_never_bounded_above_its_epsilon(epsilon):
    """A mechanism of known epsilon: below it 95 times in 100, and near with many."""
    np_rng = np.random.RandomState(0)
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    count = 2000
    above = []
    for _ in range(20):
        inside = np_rng.rand(count) < 0.5
        told = np.where(np_rng.rand(count) < truth, inside, ~inside)
        score = told + 0.1 * np_rng.rand(count)
        guessed = [
            membership.guesses(score, inside, share) for share in membership.SHARES
        ]
        above.append(membership.bound(count, guessed, 1e-5))
    assert np.mean(np.array(above) > epsilon) <= 0.1
    assert np.median(above) > 0.75 * epsilon


def test_guesses_at_random_bound_nothing():
    np_rng = np.random.RandomState(0)
    found = []
    for _ in range(100):
        score, inside = np_rng.rand(320), np_rng.rand(320) < 0.5
        guessed = [
            membership.guesses(score, inside, share) for share in membership.SHARES
        ]
        found.append(membership.bound(320, guessed, 1e-5))
    assert np.mean(np.array(found) > 0) <= 0.08
    assert membership.bound(0, [], 1e-5) == 0
