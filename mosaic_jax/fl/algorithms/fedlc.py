"""FedLC (Zhang et al., 2022): logits calibrated by how rare a client's classes are."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.local_sgd import Seen


@dataclasses.dataclass(frozen=True)
class FedLC(Algorithm):
    """FedAvg whose local loss has logit c lowered by `tau n_c^(-1/4)`.

    Rare classes must win by a larger margin than frequent ones. The model itself, which
    is averaged and evaluated, has no such margins.
    """

    per_image = True
    reads_label_counts = True

    tau: float = schema.at_least(
        0, default=1.0, meaning="of the margins tau n_c^(-1/4); 0: FedAvg"
    )
    # As the count of a class goes to 0, the class leaves the softmax.
    absent_count: float = schema.above(
        0, default=1e-8, meaning="what n_c is of a class that the client lacks"
    )

    def margin(self, label_count: Array) -> Array:
        """Margins [K] of a client with `label_count` [K] images of each class."""
        count = jnp.where(label_count > 0, label_count, self.absent_count)
        return self.tau * count.astype(jnp.float32) ** -0.25

    def logits(self, logits: Array, seen: Seen) -> Array:
        """Logits [B, K] less the margins of their classes."""
        return logits - self.margin(seen.turn.client.label_count)[None]
