"""Floating-point operations as XLA counts them, against a count by hand."""

import jax.numpy as jnp

from mosaic_jax.core import flops


def test_a_product_of_matrices():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert flops.count(jnp.matmul, a, b) == 2 * 3 * 4 * 5
