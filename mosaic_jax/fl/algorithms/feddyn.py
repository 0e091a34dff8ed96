"""FedDyn (Acar et al., 2021): local losses corrected so that their optima agree."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema, trees
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import Seen


@dataclasses.dataclass(frozen=True)
class FedDyn(Algorithm):
    """Dynamic regularisation (algorithm 1 of the paper).

    A client minimises `F_i(w) - <h_i, w> + alpha / 2 ||w - w_global||^2` and then sets
    `h_i <- h_i - alpha (w_i - w_global)`; the server keeps the mean h of all h_i and
    sets the global parameters to `mean w_i - h / alpha`. Means are weighted by sample
    counts here, as everywhere in this library; the paper's are uniform. Batch-norm
    statistics are averaged.
    """

    per_image = True

    alpha: float = schema.above(0, default=0.01, meaning="weight of the regulariser")

    def init_server(self, model: ModelState) -> Tree:
        """The mean h of the clients' h_i, 0 at first."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def init_client(self, model: ModelState) -> Tree:
        """The client's h_i, 0 at first."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """`alpha / 2 ||w - w_global||^2 - <h_i, w>`."""
        terms = jax.tree.map(
            lambda w, old, h: jnp.sum(self.alpha / 2 * (w - old) ** 2 - h * w),
            params,
            seen.turn.model.params,
            seen.turn.state,
        )
        return trees.total(terms)

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The local model; the new h_i is `h_i - alpha (w_i - w_global)`."""
        del loss
        state = jax.tree.map(
            lambda h, w, old: h - self.alpha * (w - old),
            turn.state,
            trained.params,
            turn.model.params,
        )
        return trained, state

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """Update h by the clients that took part, and correct the mean model by it."""
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
