"""A divergence for the distillation."""

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array


def total_variation(a_logits: Array, b_logits: Array) -> Array:
    """Total variation of the two softmaxes per sample, [B], in [0, 1]."""
    difference = jax.nn.softmax(a_logits) - jax.nn.softmax(b_logits)
    return 0.5 * jnp.sum(jnp.abs(difference), axis=-1)
