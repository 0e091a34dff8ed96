"""FedRolex (Alam et al., NeurIPS 2022): a window of channels that moves on."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.algorithms.partial import PartialTraining
from mosaic_jax.types import Array


@dataclasses.dataclass(frozen=True)
class FedRolex(PartialTraining):
    """In `width` rounds every channel is held equally often.

    Reference: the original code moves the window backwards, which covers the same.
    """

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """From channel `number` on, wrapping around."""
        del key
        return (number + jnp.arange(kept)) % width
