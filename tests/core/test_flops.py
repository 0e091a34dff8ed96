"""Floating-point operations of the model, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax.core import flops


def test_a_product_of_matrices():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert flops.count(jnp.matmul, a, b) == 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("stride", "size", "groups"), [(1, 8, 1), (2, 4, 1), (1, 8, 3)]
)
def test_a_convolution_whose_borders_count_in_full(stride, size, groups):
    def run(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3 // groups, 6))
    expected = 2 * (2 * size * size * 6) * (3 * 3 * 3 // groups)
    assert flops.count(run, image, kernel) == expected


def test_a_transposed_convolution_without_the_zeros_between_pixels():
    def run(image, kernel):
        return jax.lax.conv_transpose(image, kernel, (2, 2), "SAME")

    image, kernel = jnp.zeros((1, 4, 4, 3)), jnp.zeros((4, 4, 3, 5))
    # Each of 4 x 4 pixels and 3 channels goes to a window of 4 x 4 and 5 channels.
    assert flops.count(run, image, kernel) == 2 * (4 * 4 * 3) * (4 * 4 * 5)


def test_products_in_a_loop_count_in_each_iteration():
    def run(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x)

    assert flops.count(run, jnp.zeros((2, 4)), jnp.zeros((4, 4))) == 7 * 2 * 2 * 4 * 4


def test_what_is_no_product_does_not_count():
    assert flops.count(lambda x: jnp.sum(jnp.tanh(x) ** 2), jnp.zeros((9, 9))) == 0
