"""Every lowering of a depthwise convolution equals the plain one, alone and batched."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mosaic_jax.core import flops, programs
from mosaic_jax.nn import conv, depthwise

# size, stride, padding, side of the input: the networks' own, and odd ones.
SHAPES = [(3, 1, 1, 6), (3, 2, 1, 6), (3, 2, 1, 7), (5, 3, 2, 11), (2, 2, 0, 5)]


def plain(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def with_gradients(function, *settings):
    def run(a, b, cotangent):
        result, pull_back = jax.vjp(lambda a, b: function(a, b, *settings), a, b)
        return result, *pull_back(cotangent)

    return jax.jit(run)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def arrays(size, stride, padding, side, clients=2, channels=3):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (clients, 4, side, side, channels))
    kernel = jax.random.normal(keys[1], (clients, size, size, 1, channels))
    out = jax.eval_shape(lambda: plain(x[0], kernel[0], stride, padding))
    return x, kernel, jax.random.normal(keys[2], (clients, *out.shape))


def test_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    found = depthwise.depthwise(x, kernel, 1, 1)[0, :, :, 0]
    # The pixel at (0, 0) sees itself by tap 4, its neighbours by 5, 7 and 8.
    expected = [[4 + 10 + 21 + 32, 3 + 8 + 18 + 28], [1 + 4 + 12 + 20, 2 + 9 + 16]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lowering", conv.LOWERINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clients_with_their_own_kernels(shape, lowering):
    settings, args = shape[1:3], arrays(*shape)
    expected = jax.vmap(with_gradients(plain, *settings))(*args)
    ours = with_gradients(depthwise.depthwise, *settings, lowering)
    close(jax.jit(jax.vmap(ours))(*args), expected)
    close(ours(*(array[0] for array in args)), (array[0] for array in expected))


@pytest.mark.parametrize("lowering", ["auto", "grouped"])
@pytest.mark.parametrize("batched", [*itertools.product((0, None), repeat=3)][1:-1])
@pytest.mark.slow
def test_some_batched(batched, lowering):
    args = [
        array if axis == 0 else array[0]
        for array, axis in zip(arrays(3, 2, 1, 7), batched, strict=True)
    ]
    ours = with_gradients(depthwise.depthwise, 2, 1, lowering)
    expected = jax.vmap(with_gradients(plain, 2, 1), in_axes=batched)(*args)
    close(jax.vmap(ours, in_axes=batched)(*args), expected)


def test_clients_are_groups_of_one_convolution():
    args = arrays(3, 1, 1, 6)
    grouped = jax.vmap(with_gradients(depthwise.depthwise, 1, 1, "grouped"))
    assert "feature_group_count=6" in str(jax.make_jaxpr(grouped)(*args))
    ours = jax.vmap(with_gradients(depthwise.depthwise, 1, 1))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(ours)(*args))


@pytest.mark.parametrize("lowering", conv.LOWERINGS)
def test_program_does_not_grow_with_clients(lowering):
    ours = jax.vmap(with_gradients(depthwise.depthwise, 2, 1, lowering))
    args = arrays(3, 2, 1, 7)

    def length(clients):
        shapes = [jax.ShapeDtypeStruct((clients, *a.shape[1:]), a.dtype) for a in args]
        return jax.jit(ours).lower(*shapes).as_text().count("\n")

    with programs.traced_for("gpu"):
        assert length(2) == length(200)


def test_bfloat16_accumulates_in_float32():
    ones = jnp.ones((64, 8, 8, 1), jnp.bfloat16)
    geometry = conv.Geometry((8, 8), 1, 1, 0, "auto", "cpu")
    # 4096 ones: a bfloat16 sum would stop at 256.
    found = depthwise.on_kernel(geometry, ones, ones)
    assert (found.dtype, float(found[0, 0, 0, 0])) == (jnp.bfloat16, 4096)


def test_flops_are_those_of_the_taps():
    x, kernel, _ = (array[0] for array in arrays(3, 2, 1, 8))
    depthwise.depthwise(x, kernel, 2, 1)
    counted = flops.count(lambda x: depthwise.depthwise(x, kernel, 2, 1), x)
    # Multiply-adds of nine taps at 4 x 4 places of 4 images of 3 channels.
    assert counted == 2 * 9 * 4 * 4 * 4 * 3
