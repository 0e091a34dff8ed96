"""FedRS (Li and Zhan, 2021): restricted softmax for classes that a client lacks."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.local_sgd import Seen


@dataclasses.dataclass(frozen=True)
class FedRS(Algorithm):
    """FedAvg whose local loss has the logits of class c multiplied by s_c <= 1.

    The model itself, which is averaged and evaluated, has no such factors.
    """

    per_image = True
    reads_label_counts = True

    alpha: float = schema.between(
        0, 1, default=0.5, meaning="s_c of a class that the client lacks; 1: FedAvg"
    )
    # "graded", s_c = alpha + (1 - alpha) n_c / max n_c, is that of the authors' code.
    mode: str = schema.one_of(
        ("binary", "graded"),
        default="binary",
        meaning="graded: s_c grows with the number of images n_c",
    )
    # The published code of Mosaic has 0.01, with alpha 0.1.
    growth: float = schema.at_least(
        0, default=0.0, meaning="alpha grows by growth * r after round r = 1, 2, ..."
    )
    cap: float = schema.between(
        0, 1, default=1.0, meaning="upper limit of a growing alpha"
    )

    def scale(self, label_count: Array, number: Array) -> Array:
        """Factors s [K] of a client with `label_count` [K] images in round `number`."""
        alpha = self.alpha
        if self.growth:
            grown = alpha + self.growth * number * (number + 1) / 2
            alpha = jnp.maximum(alpha, jnp.minimum(grown, self.cap))
        held = (label_count > 0).astype(jnp.float32)
        if self.mode == "graded":
            held = label_count / jnp.maximum(jnp.max(label_count), 1)
        return alpha + (1 - alpha) * held

    def logits(self, logits: Array, seen: Seen) -> Array:
        """Logits [B, K] times the factors of their classes."""
        turn = seen.turn
        return logits * self.scale(turn.client.label_count, turn.number)[None]
