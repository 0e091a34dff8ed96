"""Server momentum (Hsu et al., 2019, FedAvgM) as a federated algorithm."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm


@dataclasses.dataclass(frozen=True)
class ServerMomentum(Algorithm):
    """FedAvg whose server goes on in the direction of earlier rounds."""

    momentum: float = schema.below_one(0.5, "share of the last step in the next one")

    def init_server(self, model: ModelState) -> Tree:
        """The last step, like the parameters."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """Step from the global model towards the mean of the clients' models."""
        del share
        step = jax.tree.map(
            lambda last, old, new: self.momentum * last + (new - old),
            server_state,
            model.params,
            mean_upload.params,
        )
        params = jax.tree.map(jnp.add, model.params, step)
        return step, mean_upload.replace(params=params)
