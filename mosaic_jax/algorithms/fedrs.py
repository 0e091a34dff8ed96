"""FedRS (Li and Zhan, 2021): restricted softmax for the classes a client lacks."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax import settings
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.types import Array


@dataclasses.dataclass(frozen=True)
class FedRS(Algorithm):
    """FedAvg with the local logits of class c multiplied by s_c <= 1.

    Measured and averaged is the plain model.

    Attributes:
      alpha: s_c of a class that the client lacks; 1: FedAvg.
      mode: "binary": s_c = 1 for every class it holds (the paper); "graded":
        alpha + (1 - alpha) n_c / max n_c (the authors' code).
      growth: alpha grows by growth * r after round r = 1, 2, ... (published code of
        Mosaic: 0.01, from alpha 0.1).
      cap: no further than this.
    """

    alpha: float = settings.between(0, 1)
    mode: str = settings.one_of("binary", "graded")
    growth: float = settings.at_least(0)
    cap: float = settings.between(0, 1)

    def scale(self, label_count: Array, number: Array) -> Array:
        """The factors s [K] of a client with `label_count` [K] in round `number`."""
        alpha = self.alpha
        if self.growth:
            grown = alpha + self.growth * number * (number + 1) / 2
            alpha = jnp.maximum(alpha, jnp.minimum(grown, self.cap))
        held = (label_count > 0).astype(jnp.float32)
        if self.mode == "graded":
            held = label_count / jnp.maximum(jnp.max(label_count), 1)
        return alpha + (1 - alpha) * held

    def logits(self, logits: Array, label_count: Array, number: Array) -> Array:
        """Scaled by class."""
        return logits * self.scale(label_count, number)[None]
