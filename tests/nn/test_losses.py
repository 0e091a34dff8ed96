"""Losses against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_jax.core import errors
from mosaic_jax.nn import losses

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
    small = distil(student, teacher, weight=jnp.array([1e-3, 0.0]))
    assert small == pytest.approx(float(first), rel=1e-6)
    assert distil(student, teacher, weight=jnp.zeros(2)) == 0


def test_unknown_divergence():
    message = "distill.divergence = 'kl': unknown, known: jsd, logit_mean; or 'package"
    with pytest.raises(errors.ConfigError, match=message):
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


def softmax(x, temperature=1.0):
    """In double precision, by NumPy, as the formulas below."""
    x = np.exp(np.asarray(x, float) / temperature)
    return x / x.sum(-1, keepdims=True)


def kl_of(p, q):
    return (p * np.log(p / q)).sum(-1)


def divergence_of(name, s, t, temperature):
    p, q = softmax(s, temperature), softmax(t, temperature)
    if name == "jsd":
        return (kl_of(p, (p + q) / 2) + kl_of(q, (p + q) / 2)) / 2
    middle = softmax((s + t) / 2, temperature)
    return (kl_of(middle, p) + kl_of(middle, q)) / 2


NP_RNG = np.random.RandomState(0)
STUDENT, TEACHER = NP_RNG.normal(0, 2, (2, 5, 4))


@pytest.mark.parametrize("weight", [None, [0.5, 0.0, 2.0, 1.0, 0.25]])
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_distillation_by_its_formula(divergence, weight):
    p, q = softmax(STUDENT, 3.0), softmax(TEACHER, 3.0)
    label = TEACHER.argmax(-1)
    each = (
        0.3 * 9 * kl_of(q, p)
        - 0.7 * np.log(softmax(STUDENT)[np.arange(5), label])
        + 0.6 * divergence_of(divergence, STUDENT, TEACHER, 3.0)
    )
    options = {"temperature": 3.0, "alpha": 0.3, "beta": 0.6, "divergence": divergence}
    array = None if weight is None else jnp.array(weight)
    found = distil(jnp.array(STUDENT), jnp.array(TEACHER), weight=array, **options)
    np.testing.assert_allclose(found, np.average(each, weights=weight), rtol=1e-5)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_the_teacher_is_a_constant(divergence):
    gradient = jax.grad(lambda t: distil(jnp.array(STUDENT), t, divergence=divergence))
    np.testing.assert_array_equal(gradient(jnp.array(TEACHER)), 0)


def test_divergences_by_their_formulas():
    s, t = jnp.array(STUDENT), jnp.array(TEACHER)
    for name, function in (
        ("jsd", losses.jensen_shannon),
        ("logit_mean", losses.logit_mean_divergence),
    ):
        expected = divergence_of(name, STUDENT, TEACHER, 1.0)
        np.testing.assert_allclose(function(s, t), expected, rtol=1e-4)


def test_masked_mean_by_hand():
    value = jnp.array([1.0, 4.0, jnp.nan, 7.0])
    assert losses.masked_mean(value, jnp.array([True, True, False, True])) == 4.0
    assert losses.masked_mean(value, jnp.zeros(4, bool)) == 0.0
    assert losses.masked_mean(jnp.array([1.0, 4.0])) == 2.5


def test_cross_entropy_is_a_mean_over_samples():
    label = np.array([0, 3, 1, 1, 2])
    each = -np.log(softmax(STUDENT)[np.arange(5), label])
    found = losses.cross_entropy(jnp.array(STUDENT), jnp.array(label))
    np.testing.assert_allclose(found, each.mean(), rtol=1e-5)
    mask = np.array([True, False, True, True, False])
    found = losses.cross_entropy(jnp.array(STUDENT), jnp.array(label), jnp.array(mask))
    np.testing.assert_allclose(found, each[mask].mean(), rtol=1e-5)


def test_entropy_and_diversity_by_their_formulas():
    p, target = softmax(STUDENT), np.array([0.1, 0.2, 0.3, 0.4])
    found = losses.entropy(jnp.array(STUDENT))
    np.testing.assert_allclose(found, -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    mean = p.mean(0)
    expected = (mean * np.log(mean / (4 * target))).sum()
    found = losses.diversity(jnp.array(STUDENT), jnp.array(target))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("power", [1, 2])
def test_pairwise_diversity_by_its_formula(power):
    image, noise = NP_RNG.uniform(-1, 1, (3, 2, 2, 3)), NP_RNG.normal(size=(3, 5))
    pairs = [
        np.mean(np.abs(image[a] - image[b]) ** power)
        * np.mean((noise[a] - noise[b]) ** 2)
        for a in range(3)
        for b in range(3)
    ]
    found = losses.pairwise_diversity(jnp.array(image), jnp.array(noise), power=power)
    np.testing.assert_allclose(found, np.exp(-np.mean(pairs)), rtol=1e-5)


def test_statistics_distance_sums_over_layers():
    a, b = (
        {
            layer: {"mean": NP_RNG.normal(size=3), "var": NP_RNG.uniform(size=3)}
            for layer in ("bn1", "bn2")
        }
        for _ in range(2)
    )
    expected = sum(
        np.linalg.norm(a[layer][name] - b[layer][name])
        for layer in a
        for name in ("mean", "var")
    )
    found = losses.statistics_distance(*jax.tree.map(jnp.array, (a, b)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
