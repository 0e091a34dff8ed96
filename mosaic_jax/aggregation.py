"""Averages of client models: the global model and one expert per class."""

import jax
import jax.numpy as jnp

from mosaic_jax import trees
from mosaic_jax.models import submodel
from mosaic_jax.types import Array, Experts, ModelState, Tree


def federated_average(client_tree: Tree, weight: Array) -> Tree:
    """`sum_i w_i theta_i / sum_i w_i` over clients [C, ...] (McMahan et al., 2017).

    Parameters and batch-norm statistics alike. Args: `weight` [C] float32, not
    negative; a client of weight 0 changes nothing.
    """
    return trees.weighted_mean(client_tree, weight)


def weighted(tree: Tree, weight: Array) -> Tree:
    """`weight * tree`; zeros for weight [] = 0, even where a leaf is not finite.

    Summed over clients with weights n_i / sum_j n_j this is `federated_average`.
    """
    return jax.tree.map(
        lambda leaf: jnp.where(weight > 0, weight.astype(leaf.dtype) * leaf, 0), tree
    )


def class_experts(
    client_model: ModelState,
    label_count: Array,
    model: ModelState,
    share: ModelState | None = None,
) -> Experts:
    """Expert of class c: `sum_i n_ic theta_i / sum_i n_ic` (spec of Mosaic, stage 4).

    Args:
      client_model: leaves [C, ...].
      label_count: [C, K], samples of class k at client i.
      model: the global model, which stands in for the expert of a class that no
        client holds.
      share: 1 where a client [C, ...] holds the network, 0 elsewhere, as in
        `submodel.Part`; None: all hold all. Each parameter is then averaged over the
        clients that hold it, and the global one stands in where none does.

    Returns:
      Experts with leaves [K, ...].
    """
    count = jnp.asarray(label_count, jnp.float32)
    present = jnp.sum(count, axis=0) > 0

    def average(weight: Array) -> ModelState:
        mean = federated_average(client_model, weight)
        if share is None:
            return mean
        return submodel.merge(
            submodel.Part(mean, federated_average(share, weight)), model
        )

    def expert(args: tuple[Array, Array]) -> ModelState:
        weight, held = args
        # A column of zeros would divide by zero before it is replaced.
        return trees.select(held, average(weight + ~held), model)

    return Experts(model=jax.lax.map(expert, (count.T, present)), present=present)
