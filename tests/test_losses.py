"""Losses against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_jax import losses

logits = st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4)


def distil(student, teacher, **changes):
    options = {
        "temperature": 1.0,
        "alpha": 0.8,
        "beta": 1.0,
        "divergence": "jsd",
    } | changes
    return losses.distillation(student, teacher, **options)


def test_kl_direction():
    p, q = jnp.log(jnp.array([[0.75, 0.25]])), jnp.log(jnp.array([[0.5, 0.5]]))
    assert losses.kl(p, q)[0] == pytest.approx(0.130812, abs=1e-6)
    assert losses.kl(q, p)[0] == pytest.approx(0.143841, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(a=logits, b=logits)
def test_divergences_are_bounded(a, b):
    a, b = jnp.array([a]), jnp.array([b])
    jsd = losses.jensen_shannon(a, b)[0]
    assert -1e-6 <= jsd <= np.log(2) + 1e-6
    assert losses.kl(a, b)[0] >= -1e-5
    assert losses.logit_mean_divergence(a, b)[0] >= -1e-5


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_equal_logits(divergence):
    same = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    loss = distil(same, same, alpha=1.0, divergence=divergence)
    assert loss == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(lambda s: distil(s, same, alpha=1.0, divergence=divergence))
    np.testing.assert_allclose(gradient(same), 0, atol=1e-6)


def test_jsd_of_opposites_is_ln_2():
    a, b = jnp.array([[50.0, -50.0]]), jnp.array([[-50.0, 50.0]])
    assert losses.jensen_shannon(a, b)[0] == pytest.approx(np.log(2), abs=1e-6)


def test_soft_target_keeps_its_scale_with_temperature():
    student = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    teacher = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    loss = distil(student, teacher, alpha=1.0, beta=0.0, temperature=20.0)
    assert loss == pytest.approx(0.249922, rel=1e-3)


def test_weights_of_samples():
    student = jnp.array([[1.0, 0.0], [5.0, -5.0]])
    teacher = jnp.array([[0.0, 1.0], [0.0, 9.0]])
    first = distil(student[:1], teacher[:1])
    weighted = distil(student, teacher, weight=jnp.array([2.0, 0.0]))
    assert weighted == pytest.approx(float(first), rel=1e-6)
    assert distil(student, teacher, weight=jnp.zeros(2)) == 0


def test_unknown_divergence():
    with pytest.raises(ValueError, match="must be jsd or logit_mean"):
        distil(jnp.zeros((1, 2)), jnp.zeros((1, 2)), divergence="kl")


def test_masked_cross_entropy_ignores_padding():
    scores = jnp.array([[2.0, 0.0], [jnp.nan, 0.0]])
    loss = losses.cross_entropy(scores, jnp.array([0, 1]), jnp.array([True, False]))
    assert loss == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-6)


def test_adversarial_losses_are_binary_cross_entropy():
    scores = jnp.array([0.0, 2.0])
    assert losses.adversarial(scores, True) == pytest.approx(
        np.mean([np.log(2), np.log1p(np.exp(-2))]), rel=1e-6
    )
    assert losses.adversarial(scores, False) == pytest.approx(
        np.mean([np.log(2), np.log1p(np.exp(2))]), rel=1e-6
    )


def test_entropy_and_diversity():
    uniform = jnp.full(2, 0.5)
    sure_and_spread = jnp.array([[50.0, -50.0], [-50.0, 50.0]])
    sure_and_same = jnp.array([[50.0, -50.0], [50.0, -50.0]])
    assert losses.entropy(sure_and_same) == pytest.approx(0, abs=1e-6)
    assert losses.entropy(jnp.zeros((3, 2))) == pytest.approx(np.log(2), rel=1e-6)
    assert losses.diversity(sure_and_spread, uniform) == pytest.approx(-np.log(2))
    assert losses.diversity(sure_and_same, uniform) == pytest.approx(0, abs=1e-6)


def test_diversity_is_lowest_at_the_target():
    target = jnp.array([0.25, 0.75])

    def at(share):
        mean = jnp.log(jnp.array([[share, 1 - share]]))
        return losses.diversity(mean, target)

    assert at(0.25) == pytest.approx(-np.log(2), rel=1e-6)
    assert at(0.25) < at(0.2)
    assert at(0.25) < at(0.3)


def test_statistics_distance():
    zero = {"bn": {"mean": jnp.zeros(3), "var": jnp.zeros(3)}}
    unit = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    assert losses.statistics_distance(zero, unit) == pytest.approx(3**0.5)
    assert losses.statistics_distance(unit, unit) == 0
    gradient = jax.grad(lambda m: losses.statistics_distance(m, unit))(unit)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
