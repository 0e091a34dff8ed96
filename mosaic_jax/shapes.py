"""Axes added by hand: in this library arrays of unlike rank never meet unseen."""

import jax.numpy as jnp

from mosaic_jax.types import Array


def last(vector: Array, rank: int) -> Array:
    """`vector` [F] as [1, ..., 1, F] of `rank` axes, to meet arrays [..., F]."""
    return jnp.expand_dims(vector, range(rank - 1))
