"""Federated Dropout (Caldas et al., 2018): random channels in every round."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.partial import PartialTraining


@dataclasses.dataclass(frozen=True)
class FedDropout(PartialTraining):
    """Channels are drawn for each client and round, one set per residual stream.

    Reference: the code of FedRolex draws a set for each convolution, so that identity
    shortcuts add channels that do not belong together.
    """

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """A random subset of the channels, in ascending order."""
        del number
        return jnp.sort(jax.random.permutation(key, width)[:kept])
