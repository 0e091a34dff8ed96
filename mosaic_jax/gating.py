"""Weights of the experts for each sample."""

import jax
import jax.numpy as jnp

from mosaic_jax.types import Array

GATES = ("none", "global_topk")


def global_topk(global_logits: Array, k: int) -> Array:
    """The frozen global model's k largest class probabilities, renormalised.

    Args:
      global_logits: [B, K] of the global model; expert c answers for class c.
      k: experts kept per sample, 1..K.

    Returns:
      [B, K] float32, rows sum to 1, K - k zeros in each.
    """
    probability = jax.nn.softmax(global_logits)
    value, index = jax.lax.top_k(probability, k)
    rows = jnp.arange(len(probability))[:, None]
    kept = jnp.zeros_like(probability).at[rows, index].set(value)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def apply(expert_logits: Array, weight: Array) -> Array:
    """Scale expert logits [B, E, K] by `weight` [B, E]; uniform changes nothing."""
    return expert_logits * weight[:, :, None] * weight.shape[1]
