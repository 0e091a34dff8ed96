"""Federated Dropout (Caldas et al., 2018): channels drawn anew each round."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.algorithms.partial import PartialTraining
from mosaic_jax.types import Array


@dataclasses.dataclass(frozen=True)
class FedDropout(PartialTraining):
    """Each client and round draws its own channels, one set per residual stream.

    Reference: FedRolex's code draws a set for each convolution, so that identity
    shortcuts add channels that do not belong together.
    """

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """A random subset, in ascending order."""
        del number
        return jnp.sort(jax.random.permutation(key, width)[:kept])
