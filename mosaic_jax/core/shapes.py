"""Explicit broadcasting: arrays of different rank are never combined implicitly."""

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array


def last(vector: Array, rank: int) -> jax.Array:
    """`vector` [F] reshaped to [1, ..., 1, F] with `rank` axes, for arrays [..., F]."""
    return jnp.expand_dims(vector, range(rank - 1))
