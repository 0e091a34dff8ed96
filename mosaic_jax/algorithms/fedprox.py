"""FedProx (Li et al., 2020): local training is held near the global model."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax import settings
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.types import Array, Tree


@dataclasses.dataclass(frozen=True)
class FedProx(Algorithm):
    """FedAvg with `mu / 2 ||w - w_global||^2` in the local loss (eq. 2).

    Over all trainable parameters, those of batch-norm included, its running statistics
    not; w_global is the model received in this round.
    """

    mu: float = settings.at_least(0)

    def penalty(self, params: Tree, global_params: Tree, client_state: Tree) -> Array:
        """The proximal term."""
        del client_state
        squares = jax.tree.map(
            lambda w, old: jnp.sum((w - old) ** 2), params, global_params
        )
        return self.mu / 2 * sum(jax.tree.leaves(squares))
