"""Weights of the experts for each sample."""

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array

GATES = ("none", "global_topk")


def global_topk(global_logits: Array, k: int) -> Array:
    """The global model's k largest class probabilities, renormalised.

    Args:
      global_logits: [B, K] of the frozen global model; entry c is for expert c.
      k: experts kept per sample, 1..K.

    Returns:
      [B, K] float32; rows sum to 1 and have K - k zeros.
    """
    probability = jax.nn.softmax(global_logits)
    value, index = jax.lax.top_k(probability, k)
    rows = jnp.arange(len(probability))[:, None]
    kept = jnp.zeros_like(probability).at[rows, index].set(value)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def apply(expert_logits: Array, weight: Array) -> Array:
    """Scale expert logits [B, E, K] by E `weight` [B, E], whose rows sum to 1."""
    return expert_logits * weight[:, :, None] * weight.shape[1]
