"""Anchors: their values and gradients by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core.types import Batch, ModelState
from mosaic_jax.fl import algorithms
from mosaic_jax.fl.anchors import Anchor, anchored
from mosaic_jax.fl.client_program import ClientProgram
from tests import tiny

WEIGHT, T = 0.5, 2.0


def program(algorithm=None):
    """The client's algorithm, and a network of one layer over its features."""
    classifier = types.SimpleNamespace(
        head=lambda model, x: x @ model.params["w"],
        logits=lambda model, x: x @ model.params["w"],
    )
    return types.SimpleNamespace(
        algorithm=algorithm or algorithms.FedAvg(), classifier=classifier
    )


def seen_with(anchor, **fields):
    """What a loss sees whose client got another model than the anchor in this round."""
    seen = tiny.seen(**fields)
    return seen.replace(turn=seen.turn.replace(anchor=anchor))


def test_the_distance_is_from_the_anchor_and_not_from_the_rounds_model():
    old, got = {"w": jnp.array([1.0, -1.0])}, {"w": jnp.array([9.0, 9.0])}
    seen = seen_with(ModelState(old, {}), model=ModelState(got, {}))
    penalty = functools.partial(Anchor("proximal", WEIGHT, T).penalty, program())
    value, gradient = jax.value_and_grad(penalty)({"w": jnp.array([2.0, 1.0])}, seen)
    assert value == pytest.approx(WEIGHT / 2 * (1 + 4))
    np.testing.assert_allclose(gradient["w"], WEIGHT * np.array([1.0, 2.0]))


def test_the_distance_leaves_batch_norm_to_clients_that_keep_their_own():
    params = {"bn": {"scale": jnp.array([1.0])}, "conv": {"kernel": jnp.array([1.0])}}
    moments = {"bn": {"mean": jnp.array([0.0])}}
    own = {"params": {"bn/scale": jnp.array([5.0])}, "batch_stats": moments}
    anchor = ModelState(params, moments)
    seen = seen_with(anchor, model=anchor, state=own)
    penalty = Anchor("proximal", WEIGHT, T).penalty
    now = {"bn": {"scale": jnp.array([5.5])}, "conv": {"kernel": jnp.array([3.0])}}
    gradient = jax.grad(lambda p: penalty(program(algorithms.FedBN()), p, seen))(now)
    assert gradient["bn"]["scale"] == pytest.approx(WEIGHT * 0.5)
    assert gradient["conv"]["kernel"] == pytest.approx(WEIGHT * 2)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_the_divergence_and_its_gradient():
    """weight T^2 KL(p || q), whose gradient by the own logits is weight T (q - p)."""
    np_rng = np.random.RandomState(0)
    x, w, old = (np_rng.randn(*shape) for shape in ((3, 4), (4, 5), (4, 5)))
    # The image that is masked must not count, be it what it may.
    x[2] = 100.0
    mask = np.array([True, True, False])
    batch = Batch(image=jnp.array(x), label=jnp.zeros(3, int), mask=jnp.array(mask))
    got = ModelState({"w": jnp.zeros((4, 5))}, {})
    seen = seen_with(ModelState({"w": jnp.array(old)}, {}), model=got)
    seen = seen.replace(batch=batch, features=jnp.array(x))
    penalty = functools.partial(Anchor("distilled", WEIGHT, T).penalty, program())
    value, gradient = jax.value_and_grad(penalty)({"w": jnp.array(w)}, seen)
    p, q = softmax(x @ old / T)[:2], softmax(x @ w / T)[:2]
    expected = WEIGHT * T**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
    assert value == pytest.approx(expected, rel=1e-5)
    slope = x[:2].T @ (WEIGHT * T * (q - p) / 2)
    np.testing.assert_allclose(gradient["w"], slope, rtol=1e-4, atol=1e-6)
    # Nothing is left where both answer alike.
    value, gradient = jax.value_and_grad(penalty)({"w": jnp.array(old)}, seen)
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient["w"], 0, atol=1e-6)


def test_without_an_anchor_any_program_is_left_as_it_is():
    own = ClientProgram()
    assert anchored(own, None) is own
