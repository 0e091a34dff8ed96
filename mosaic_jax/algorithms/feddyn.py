"""FedDyn (Acar et al., 2021): local losses corrected so that their optima agree."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax import settings
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.types import Array, ModelState, Tree


@dataclasses.dataclass(frozen=True)
class FedDyn(Algorithm):
    """Dynamic regularisation (algorithm 1 of the paper).

    A client minimises `F_i(w) - <h_i, w> + alpha / 2 ||w - w_global||^2` and then sets
    `h_i <- h_i - alpha (w_i - w_global)`; the server keeps the mean h of all h_i and
    sets the global parameters to `mean w_i - h / alpha`. Means are weighted by sample
    counts here, as everywhere in this library; the paper's are uniform. Batch-norm
    statistics are averaged.
    """

    alpha: float = settings.above(0)

    def init_server(self, model: ModelState) -> Tree:
        """Start from h = 0."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def init_client(self, model: ModelState) -> Tree:
        """Start from h_i = 0."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def penalty(self, params: Tree, global_params: Tree, client_state: Tree) -> Array:
        """What is added to F_i."""
        terms = jax.tree.map(
            lambda w, old, h: jnp.sum(self.alpha / 2 * (w - old) ** 2 - h * w),
            params,
            global_params,
            client_state,
        )
        return sum(jax.tree.leaves(terms))

    def upload(
        self, model: ModelState, local: ModelState, client_state: Tree
    ) -> tuple[Tree, Tree]:
        """The model; h_i moves against the client's drift."""
        state = jax.tree.map(
            lambda h, w, old: h - self.alpha * (w - old),
            client_state,
            local.params,
            model.params,
        )
        return local, state

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """Move h by the share of clients that took part; correct the mean."""
        state = jax.tree.map(
            lambda h, w, old: h - share * self.alpha * (w - old),
            server_state,
            mean_upload.params,
            model.params,
        )
        params = jax.tree.map(
            lambda w, h: w - h / self.alpha, mean_upload.params, state
        )
        return state, mean_upload.replace(params=params)
