"""FedNova (Wang et al., 2020): clients with more steps do not pull further."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl import optimizers
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Turn


@dataclasses.dataclass(frozen=True)
class FedNova(Algorithm):
    """Normalised averaging (Wang et al., NeurIPS 2020; equations 8 and 9).

    A client sends `d_i = (w - w_i) / norm1(a_i)`, where norm1(a_i) is how often its
    steps count a gradient: their number for plain SGD. The server sets w to
    `w - tau sum_i p_i d_i` with `tau = sum_i p_i norm1(a_i)`, p_i = n_i / sum_j n_j.
    Rates of learning are part of d_i. Batch-norm statistics are averaged.
    """

    per_image = True

    def problems(self, study: Any) -> Iterator[str]:
        """Steps must be sums of gradients."""
        yield from optimizers.problems(study)

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """d_i, norm1(a_i), and the statistics of batch-norm."""
        del loss
        local = turn.local
        counted = optimizers.gradients_in(local.optimizer, local.momentum, turn.steps)
        way = jax.tree.map(
            lambda old, w: (old - w) / counted, turn.model.params, trained.params
        )
        sent = {
            "way": way,
            "counted": jnp.asarray(counted, jnp.float32),
            "batch_stats": trained.batch_stats,
        }
        return sent, turn.state

    def reference(self, model: ModelState) -> Tree:
        """No way at all."""
        return {
            "way": jax.tree.map(jnp.zeros_like, model.params),
            "counted": jnp.ones(()),
            "batch_stats": model.batch_stats,
        }

    def sent_model(self, upload: Tree, model: ModelState) -> ModelState:
        """Where the client's whole way leads."""
        params = jax.tree.map(
            lambda w, way: w - upload["counted"] * way, model.params, upload["way"]
        )
        return ModelState(params, upload["batch_stats"])

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """As far along the mean way as clients count gradients on average."""
        del share
        params = jax.tree.map(
            lambda w, way: w - mean_upload["counted"] * way,
            model.params,
            mean_upload["way"],
        )
        return server_state, ModelState(params, mean_upload["batch_stats"])
