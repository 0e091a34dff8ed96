"""Heads that fuse the experts' logits [B, E, K] into one prediction [B, K]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax import shapes
from mosaic_jax.models.resnet import Linear
from mosaic_jax.types import Array

HEADS = ("transformer", "linear", "diagonal", "mean")
UNTRAINED = ("diagonal", "mean")


class Attention(nn.Module):
    """Multi-head attention with PyTorch's parameters and dropout on the weights."""

    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, query: Array, memory: Array, *, train: bool) -> Array:
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
    """Post-norm transformer layer; with `memory` it also attends to that (decoder)."""

    num_heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, memory: Array | None = None, *, train: bool) -> Array:
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
    """The published meta head: experts are tokens of an encoder-decoder.

    Token width is K * K with sum pooling for 10 classes, 10 * K with mean pooling
    otherwise, as published.
    """

    num_classes: int
    dropout: float = 0.2
    hidden: int = 2048

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]; dropout when `train`."""
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
    """Stacking: one linear layer on all experts' logits."""

    num_classes: int

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]."""
        del train
        return Linear(self.num_classes, name="fc")(
            expert_logits.reshape(len(expert_logits), -1)
        )


class DiagonalHead(nn.Module):
    """Untrained: class c is scored by expert c's own log-probability of c.

    Where there are several experts of a class, by the mean of theirs.
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
    """Untrained: the mean of the experts' logits."""

    num_classes: int

    @nn.compact
    def __call__(self, expert_logits: Array, *, train: bool) -> Array:
        """Fuse `expert_logits` [B, E, K] into [B, K]."""
        del train
        return jnp.mean(expert_logits, axis=1)


def build(name: str, num_classes: int) -> nn.Module:
    """The head called `name`, one of `HEADS`."""
    heads = (TransformerHead, LinearHead, DiagonalHead, MeanHead)
    return dict(zip(HEADS, heads, strict=True))[name](num_classes)
