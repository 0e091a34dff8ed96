"""Averages of client models: the global model and one expert per class."""

import jax
import jax.numpy as jnp

from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, Experts, ModelState, Tree
from mosaic_jax.nn import submodel


def federated_average(client_tree: Tree, weight: Array) -> Tree:
    """`sum_i w_i theta_i / sum_i w_i` over clients (McMahan et al., 2017).

    Args:
      client_tree: leaves [C, ...], parameters and batch-norm statistics alike.
      weight: [C] float32, not negative; clients of weight 0 do not count, whatever
        their values.
    """
    return trees.weighted_mean(client_tree, weight)


def weighted(tree: Tree, weight: Array) -> Tree:
    """`weight * tree` for `weight` []; 0 for weight 0, even where a leaf is not finite.

    The sum over clients with weights n_i / sum_j n_j is `federated_average`.
    """
    return jax.tree.map(
        lambda leaf: jnp.where(weight > 0, weight.astype(leaf.dtype) * leaf, 0), tree
    )


def class_experts(
    client_model: ModelState,
    label_count: Array,
    model: ModelState,
    mask: ModelState | None = None,
) -> Experts:
    """Experts of the classes, `theta_c = sum_i n_ic theta_i / sum_i n_ic`.

    Source: Mosaic (arXiv 2505.19699), stage 4.

    Args:
      client_model: models of the clients, leaves [C, ...].
      label_count: [C, K] int, n_ic images of class c at client i.
      model: the global model, the expert of classes that no client has.
      mask: parameters that each client has, leaves [C, ...] as of `submodel.Part`;
        None: all clients have all. Each parameter is averaged over the clients that
        have it; it is the global model's where no client of the class does.

    Returns:
      Experts with leaves [K, ...].
    """
    count = jnp.asarray(label_count, jnp.float32)
    present = jnp.sum(count, axis=0) > 0

    def average(weight: Array) -> ModelState:
        mean = federated_average(client_model, weight)
        if mask is None:
            return mean
        return submodel.merge(
            submodel.Part(mean, federated_average(mask, weight)), model
        )

    def expert(args: tuple[Array, Array]) -> ModelState:
        weight, held = args
        # Without the 1 a class that no client has would divide by zero.
        return trees.select(held, average(weight + ~held), model)

    return Experts(model=jax.lax.map(expert, (count.T, present)), present=present)
