"""Every lowering of a convolution equals the plain one, alone and under `vmap`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mosaic_jax.core import flops, programs
from mosaic_jax.nn import conv

# size, stride, padding, side of the input: the networks' own, and odd ones.
SHAPES = [
    (3, 1, 1, 6),
    (3, 2, 1, 6),
    (3, 2, 1, 7),
    (1, 2, 0, 6),
    (4, 2, 1, 8),
    (4, 2, 1, 4),
    (2, 2, 0, 2),
    (4, 1, 0, 4),
    (5, 3, 2, 11),
]


def plain(x, kernel, stride, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=dimensions
    )


def plain_transpose(g, kernel, stride, padding):
    side = (g.shape[1] - 1) * stride + len(kernel) - 2 * padding
    x = jax.ShapeDtypeStruct((len(g), side, side, kernel.shape[2]), g.dtype)
    transpose = jax.linear_transpose(lambda x: plain(x, kernel, stride, padding), x)
    return transpose(g)[0]


def with_gradients(function, *settings):
    def run(a, b, cotangent):
        result, pull_back = jax.vjp(lambda a, b: function(a, b, *settings), a, b)
        return result, *pull_back(cotangent)

    return jax.jit(run)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def arrays(size, stride, padding, side, depth=3, channels=5):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 4, side, side, depth))
    kernel = jax.random.normal(keys[1], (2, size, size, depth, channels))
    out = jax.eval_shape(lambda: plain(x[0], kernel[0], stride, padding))
    return x, kernel, jax.random.normal(keys[2], (2, *out.shape))


@pytest.mark.parametrize("lowering", [*conv.LOWERINGS, "auto, many channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone(shape, lowering):
    settings = shape[1:3]
    lowering, _, many = lowering.partition(", ")
    counts = (9, 10) if many else (3, 5)
    x, kernel, g = (array[0] for array in arrays(*shape, *counts))
    expected = with_gradients(plain, *settings)(x, kernel, g)
    found = with_gradients(conv.convolve, *settings, lowering)(x, kernel, g)
    close(found, expected)
    expected = with_gradients(plain_transpose, *settings)
    found = with_gradients(conv.convolve_transpose, *settings, lowering)
    out = jax.eval_shape(lambda: plain_transpose(g, kernel, *settings))
    cotangent = jax.random.normal(jax.random.key(1), out.shape)
    close(found(g, kernel, cotangent), expected(g, kernel, cotangent))


@pytest.mark.parametrize("lowering", conv.LOWERINGS)
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[4:5], ids=str)
@pytest.mark.slow
def test_over_clients(shape, lowering):
    settings = shape[1:3]
    args = arrays(*shape)
    ours = with_gradients(conv.convolve, *settings, lowering)
    expected = with_gradients(plain, *settings)
    for batched in itertools.product((0, None), repeat=3):
        if batched == (None,) * 3:
            continue
        chosen = [
            array if axis == 0 else array[0]
            for array, axis in zip(args, batched, strict=True)
        ]
        close(
            jax.vmap(ours, in_axes=batched)(*chosen),
            jax.vmap(expected, in_axes=batched)(*chosen),
        )


@pytest.fixture
def accelerator():
    """The forms that run on accelerators, on this CPU."""
    with programs.traced_for("gpu"):
        yield


@pytest.mark.parametrize("lowering", conv.LOWERINGS)
@pytest.mark.slow
def test_as_on_accelerators(accelerator, lowering):
    for shape in ((3, 2, 1, 7), (3, 1, 1, 9), (4, 1, 0, 4)):
        test_alone(shape, lowering)
        test_over_clients(shape, lowering)


def test_over_seeds_and_clients():
    args = [jnp.stack([array, -array]) for array in arrays(3, 1, 1, 6)]
    ours = with_gradients(conv.convolve, 1, 1, "auto")
    expected = with_gradients(plain, 1, 1)
    close(
        jax.vmap(jax.vmap(ours))(*args),
        jax.vmap(jax.vmap(expected))(*args),
    )


@pytest.mark.parametrize("lowering", ["dense", "auto"])
def test_no_grouped_convolution_over_clients(lowering):
    args = arrays(3, 1, 1, 6)
    ours = jax.vmap(with_gradients(conv.convolve, 1, 1, lowering))
    text = str(jax.make_jaxpr(ours)(*args))
    assert "feature_group_count=2" not in text
    grouped = jax.vmap(with_gradients(conv.convolve, 1, 1, "grouped"))
    assert "feature_group_count=2" in str(jax.make_jaxpr(grouped)(*args))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("lowering", conv.LOWERINGS)
def test_program_does_not_grow_with_clients(lowering, platform):
    ours = jax.vmap(with_gradients(conv.convolve, 2, 1, lowering))
    args = arrays(3, 2, 1, 7)

    def length(clients):
        shapes = [jax.ShapeDtypeStruct((clients, *a.shape[1:]), a.dtype) for a in args]
        return jax.jit(ours).lower(*shapes).as_text().count("\n")

    with programs.traced_for(platform):
        assert length(2) == length(200)


def test_tiles_of_the_batch_change_no_gradient(monkeypatch):
    x, kernel, g = (array[0] for array in arrays(3, 1, 1, 6))
    run = with_gradients(conv.convolve, 1, 1, "auto")
    expected = run(x, kernel, g)
    monkeypatch.setattr(conv, "_TILE_BYTES", 1)
    close(run(x, kernel, g), expected)


def test_bfloat16_accumulates_in_float32():
    ones = jnp.ones((64, 8, 8, 1), jnp.bfloat16)
    geometry = conv.Geometry((8, 8), 1, 1, 0, "patches", "cpu")
    # 4096 ones: a bfloat16 sum would stop at 256.
    assert float(conv._on_kernel(geometry, ones, ones)[0, 0, 0, 0]) == 4096


def test_forms_that_waste_flops_are_not_counted():
    x, kernel, _ = (array[0] for array in arrays(3, 1, 1, 32, channels=4))

    def counted(lowering):
        return flops.count(lambda x: conv.convolve(x, kernel, 1, 1, lowering), x)

    conv.convolve(x, kernel, 1, 1)
    assert counted("auto") == counted("dense")


@pytest.mark.parametrize("lowering", ["auto", "patches"])
def test_gradients_have_gradients(lowering):
    """As gradient inversion takes them, here of the length of the gradients."""

    def seconds(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(convolve(x, kernel)))

        def length(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel))

        return jax.jit(jax.vmap(jax.grad(length, (0, 1))))

    x, kernel, _ = arrays(3, 2, 1, 6)
    found = seconds(lambda x, k: conv.convolve(x, k, 2, 1, lowering))(x, kernel)
    close(found, seconds(lambda x, k: plain(x, k, 2, 1))(x, kernel))
