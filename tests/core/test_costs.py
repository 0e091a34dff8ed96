"""What tracing tells of programs: by hand, on programs that are small enough."""

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax.core import costs, steps
from mosaic_jax.core.costs import Counts

MB = 1_000_000


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, W = f32(1000, 250), f32(250, 500)  # 1 MB, 0.5 MB; their product has 2 MB


def total(function, *shapes):
    return costs.of(function, *shapes)[0].total()


def test_a_product():
    assert total(jnp.dot, X, W) == Counts(1, 3.5 * MB, 2 * 1000 * 250 * 500)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients(stride):
    def run(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = f32(4, 8, 8, 3), f32(3, 3, 3, 16)
    forward = 2 * 4 * (8 // stride) ** 2 * 16 * 9 * 3
    assert total(run, x, w).flops == forward
    both = total(jax.grad(lambda *a: run(*a).sum(), (0, 1)), x, w)
    # That of the input slides over zeros between the gradient's rows and columns.
    assert both.flops == pytest.approx(2 * forward, rel=0.01)


def test_groups_are_not_counted_as_dense():
    def run(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    found = total(run, f32(1, 8, 8, 16), f32(3, 3, 4, 32))
    assert found.flops == 2 * 64 * 32 * 9 * 4


def test_what_is_element_by_element_is_one_kernel():
    def chain(x):
        return jnp.maximum(3 * x + 1, 0).reshape(500, 500)

    assert total(chain, X) == Counts(1, 2 * MB, 0)


def test_a_product_reads_what_is_written_once():
    def run(x, w):
        y = jnp.maximum(x, 0)
        return y @ w, y.T @ y

    # `y` is written once; each product reads it and writes its own.
    each = (1 + 0.5 + 2) + (1 + 1 + 0.25)
    found = total(run, X, W)
    assert (found.kernels, found.bytes) == (3, (2 + each) * MB)


def test_reductions_of_the_same_array_are_one_kernel():
    def moments(x):
        return x.sum(0), jnp.square(x).sum(0)

    found = total(moments, X)
    assert (found.kernels, found.bytes) == (1, MB + 2 * 1000)

    def two_passes(x):
        return jnp.square(x - x.mean(0, keepdims=True)).sum(0)

    assert total(two_passes, X).kernels == 2


def test_rows_are_read_and_not_the_table():
    rows = jax.ShapeDtypeStruct((10,), jnp.int32)
    found = total(lambda x, rows: 2 * x[rows], X, rows)
    assert found.bytes == pytest.approx(2 * 10 * 1000, rel=0.01)
    update = total(lambda x, y: x.at[3].set(y), X, f32(250))
    assert update.bytes < 5 * 1000


def test_a_barrier_writes_each_array_by_itself():
    def run(x, w):
        x, w = jax.lax.optimization_barrier((2 * x, 2 * w))
        return x + 1, w + 1

    found = total(run, X, W)
    assert (found.kernels, found.bytes) == (4, 6 * MB)


def test_loops():
    def run(x, w, count):
        def inner(i, x):
            return jnp.tanh(x @ w)

        def outer(i, x):
            return 2 * steps.train(0, 3, inner, x)

        return jax.lax.fori_loop(0, count, outer, x)

    square, count = f32(250, 250), jax.ShapeDtypeStruct((), jnp.int32)
    program, _ = costs.of(run, X, square, count)
    (outer,) = program.loops
    (inner,) = outer.loops
    assert (outer.trips, inner.trips) == (None, 3)
    assert (outer.trains, inner.trains) == (False, True)
    once = 2 * 1000 * 250 * 250
    assert inner.iteration().flops == once
    assert program.total(unknown=5).flops == 5 * 3 * once
    assert program.without(inner).total(unknown=5).flops == 0
    # Also under a batch axis.
    batched, _ = costs.of(
        jax.vmap(run, (0, None, None)), f32(2, 1000, 250), square, count
    )
    assert batched.loops[0].loops[0].trains


def test_memory_is_what_is_alive_at_once():
    def chain(x, w):
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return x

    square = f32(250, 250)
    # A product and what follows it.
    assert costs.of(chain, X, square)[1] == 2 * MB

    def loss(w, x):
        return chain(x, w).sum()

    # The gradient needs all that is between.
    assert costs.of(jax.grad(loss), square, X)[1] >= 4 * MB
