"""FedRolex (Alam et al., 2022): a window of channels that moves on every round."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.partial import PartialTraining


@dataclasses.dataclass(frozen=True)
class FedRolex(PartialTraining):
    """Every channel is trained equally often in as many rounds as there are channels.

    Reference: the original code moves the window backwards, to the same effect.
    """

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """Successive channels from `number` on, wrapping around."""
        del key
        return (number + jnp.arange(kept)) % width
