"""Heads that fuse the experts' logits [B, E, K] into one prediction [B, K]."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array
from mosaic_jax.nn.resnet import Linear


class Attention(nn.Module):
    """Multi-head attention as in PyTorch, with dropout of the attention weights."""

    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, query: Array, memory: Array, *, train: bool) -> Array:
        """Attend to tokens.

        Args:
          query: [B, Q, dim].
          memory: [B, M, dim], attended to.
          train: whether dropout is on.

        Returns:
          [B, Q, dim].
        """
        dim = query.shape[-1]
        heads = (self.num_heads, dim // self.num_heads)

        def project(name: str, x: Array) -> Array:
            init = nn.initializers.xavier_uniform()
            kernel = self.param(f"{name}_kernel", init, (dim, dim))
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (dim,))
            x = x @ kernel + shapes.last(bias, x.ndim)
            return x.reshape(*x.shape[:-1], *heads)

        q = project("query", query) * heads[1] ** -0.5
        k, v = project("key", memory), project("value", memory)
        weight = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        self.sow("intermediates", "weight", weight)
        weight = nn.Dropout(self.dropout, deterministic=not train)(weight)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weight, v).reshape(query.shape)
        return nn.Dense(dim, name="out")(mixed)


class Layer(nn.Module):
    """Transformer layer with norms after the residual sums, of encoder or decoder."""

    num_heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, memory: Array | None = None, *, train: bool) -> Array:
        """Transform tokens.

        Args:
          x: tokens [B, T, dim].
          memory: [B, M, dim], attended to by a decoder; None for an encoder.
          train: whether dropout is on.

        Returns:
          [B, T, dim].
        """
        dim = x.shape[-1]

        def drop(value: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(value)

        def norm(name: str, value: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, name=name)(value)

        attend = Attention(self.num_heads, self.dropout, name="self_attn")
        x = norm("norm1", x + drop(attend(x, x, train=train)))
        last = "norm2"
        if memory is not None:
            attend = Attention(self.num_heads, self.dropout, name="multihead_attn")
            x = norm("norm2", x + drop(attend(x, memory, train=train)))
            last = "norm3"
        hidden = drop(nn.relu(Linear(self.hidden, name="linear1")(x)))
        return norm(last, x + drop(Linear(dim, name="linear2")(hidden)))


class TransformerHead(nn.Module):
    """The published meta head: an encoder-decoder whose tokens are the experts.

    As published, tokens are 10 K wide and are pooled by their sum for 10 classes, by
    their mean otherwise.
    """

    num_classes: int
    dropout: float = 0.2
    hidden: int = 2048

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]; `train` turns dropout on."""
        dim = 10 * self.num_classes
        layer = (self.num_classes, self.hidden, self.dropout)
        tokens = Linear(dim, name="fc_expand")(expert_logits)
        memory = Layer(*layer, name="encoder")(tokens, train=train)
        memory = nn.LayerNorm(epsilon=1e-5, name="encoder_norm")(memory)
        x = Layer(*layer, name="decoder")(tokens, memory, train=train)
        x = nn.LayerNorm(epsilon=1e-5, name="decoder_norm")(x)
        pool = jnp.sum if self.num_classes == 10 else jnp.mean
        return Linear(self.num_classes, name="fc")(pool(x, axis=1))


class LinearHead(nn.Module):
    """Stacking (Wolpert, 1992): one linear layer on the logits of all experts."""

    num_classes: int

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]."""
        del train
        return Linear(self.num_classes, name="fc")(
            expert_logits.reshape(len(expert_logits), -1)
        )


class DiagonalHead(nn.Module):
    """Without parameters: class c scores the log-probability that expert c gives it.

    If there are several experts of a class, scores are the mean over them.
    """

    num_classes: int

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, n K, K] into [B, K]."""
        del train
        log_p = jax.nn.log_softmax(expert_logits)
        log_p = log_p.reshape(len(log_p), -1, self.num_classes, self.num_classes)
        return jnp.mean(jnp.diagonal(log_p, axis1=2, axis2=3), axis=1)


class MeanHead(nn.Module):
    """Without parameters: the mean of the experts' logits."""

    num_classes: int

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]."""
        del train
        return jnp.mean(expert_logits, axis=1)


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "transformer": TransformerHead,
    "linear": LinearHead,
    "diagonal": DiagonalHead,
    "mean": MeanHead,
}
# Names of the heads without parameters.
UNTRAINED = ("diagonal", "mean")
