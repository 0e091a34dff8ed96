"""Batch-norm's own gradients and moments, against plain formulas that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mosaic_jax.nn import norm

MUTABLE = ["batch_stats", "moments"]


def drawn(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), jnp.float32)


def variables(size):
    return {
        "params": {
            "scale": drawn(0, size),
            "bias": drawn(1, size),
        },
        "batch_stats": {
            "mean": drawn(2, size),
            "var": jnp.exp(drawn(3, size)),
        },
    }


@jax.numpy_rank_promotion("allow")
def plain(module, given, x, mask, train):
    """The output and the batch's moments as formulas that are not clever."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32) * (module.input_scale if train else 1)
    weight = jnp.ones(len(x)) if mask is None else mask.astype(jnp.float32)
    weight = jnp.broadcast_to(weight.reshape(-1, *[1] * (x.ndim - 1)), x.shape)
    mean = jnp.sum(wide * weight, axes) / jnp.sum(weight, axes)
    var = jnp.sum((wide - mean) ** 2 * weight, axes) / jnp.sum(weight, axes)
    stats = given["batch_stats"]
    used = (mean, var) if train else (stats["mean"], stats["var"])
    y = (wide - used[0]) * lax.rsqrt(used[1] + module.epsilon)
    y = y * given["params"]["scale"] + given["params"]["bias"]
    if module.slope is not None:
        y = jnp.where(y > 0, y, module.slope * y)
    return y, mean, var


def close(found, expected, rtol=2e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        found,
        expected,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 3), (3, 20, 20, 2)])
def test_values_and_gradients(shape, train, slope, masked):
    module = norm.BatchNorm(slope=slope, input_scale=1.7)
    given, x = variables(shape[-1]), drawn(4, *shape)
    mask = jnp.arange(shape[0]) < shape[0] - 1 if masked else None
    out = drawn(5, *shape)

    def score(y, mean, var):
        return jnp.sum(y * out) + jnp.sum(jnp.sin(mean) + mean * var**2)

    def ours(params, x):
        applied = {**given, "params": params}
        y, new = module.apply(applied, x, train=train, mask=mask, mutable=MUTABLE)
        told = new["moments"]
        return score(y, told["mean"], told["var"]), y

    def theirs(params, x):
        y, mean, var = plain(module, {**given, "params": params}, x, mask, train)
        return score(y, mean, var), y

    found, expected = (
        jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(given["params"], x)
        for run in (ours, theirs)
    )
    close(found, expected)


def test_gradient_without_told_moments():
    """The moments are left out where nobody asks for them; the gradient is the same."""
    module, given = norm.BatchNorm(slope=0.0), variables(2)
    x = drawn(4, 4, 3, 3, 2)

    def score(x, mutable):
        result = module.apply(given, x, train=False, mutable=mutable)
        return jnp.sum(jnp.sin(result[0] if mutable else result))

    without, told = (
        jax.jit(jax.grad(lambda x, mutable=mutable: score(x, mutable)))(x)
        for mutable in (False, ["moments"])
    )
    close(without, told, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_a_far_mean_loses_no_digits(offset):
    x = drawn(4, 8, 4, 4, 3) + offset
    _, new = norm.BatchNorm().apply(variables(3), x, train=True, mutable=MUTABLE)
    exact = np.asarray(x, np.float64).var(axis=(0, 1, 2))
    np.testing.assert_allclose(new["moments"]["var"], exact, rtol=1e-4)


@pytest.mark.parametrize("padding", [np.nan, np.inf, 3e4])
def test_samples_that_do_not_count_do_not_matter(padding):
    """Whatever they hold, and the first one too."""
    x = drawn(4, 4, 2, 2, 3)
    mask = jnp.array([False, True, True, True])
    module, given = norm.BatchNorm(slope=0.0), variables(3)
    run = {"train": True, "mutable": MUTABLE}
    y, new = module.apply(given, x.at[0].set(padding), mask=mask, **run)
    expected, small = module.apply(given, x[1:], **run)
    close((y[1:], new), (expected, small), rtol=1e-5)


def test_a_constant_channel_has_no_variance():
    x = jnp.full((4, 3, 3, 2), 123.456)
    y, new = norm.BatchNorm().apply(variables(2), x, train=True, mutable=MUTABLE)
    np.testing.assert_array_equal(new["moments"]["var"], 0)
    assert np.isfinite(y).all()


def test_over_clients_as_one_by_one():
    module, given = norm.BatchNorm(slope=0.2), variables(2)
    x = drawn(4, 3, 4, 5, 5, 2)

    def score(x):
        y, new = module.apply(given, x, train=True, mutable=MUTABLE)
        return jnp.sum(jnp.sin(y)), new

    run = jax.value_and_grad(score, has_aux=True)
    together, alone = jax.jit(jax.vmap(run))(x), jax.jit(run)
    each = [alone(one) for one in x]
    close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), rtol=1e-5)


def test_relu_and_its_gradient():
    x = jnp.array([-2.0, 0.0, 3.0])
    value, pull = jax.vjp(norm.relu, x)
    np.testing.assert_array_equal(value, [0, 0, 3])
    np.testing.assert_array_equal(pull(jnp.ones(3))[0], [0, 0, 1])
