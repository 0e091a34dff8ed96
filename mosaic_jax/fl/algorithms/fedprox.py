"""FedProx (Li et al., 2020): local models are kept near the global one."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema, trees
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.local_sgd import Seen


@dataclasses.dataclass(frozen=True)
class FedProx(Algorithm):
    """FedAvg with `mu / 2 ||w - w_global||^2` in the local loss (eq. 2).

    The norm is over all trainable parameters, including those of batch-norm but not its
    running statistics; w_global is the model received in this round.
    """

    per_image = True

    mu: float = schema.at_least(0, default=0.01, meaning="weight of the proximal term")

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """The proximal term `mu / 2 ||w - w_global||^2`."""
        squares = jax.tree.map(
            lambda w, old: jnp.sum((w - old) ** 2), params, seen.turn.model.params
        )
        return self.mu / 2 * trees.total(squares)
