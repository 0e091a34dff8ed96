"""HeteroFL (Diao et al., ICLR 2021): clients hold the first channels."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.algorithms.partial import PartialTraining
from mosaic_jax.types import Array


@dataclasses.dataclass(frozen=True)
class HeteroFL(PartialTraining):
    """Networks of smaller rates lie within those of larger ones."""

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """The first."""
        del key, number, width
        return jnp.arange(kept)
