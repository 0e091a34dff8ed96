"""Normalisation: batch-norm with PyTorch's running statistics, and group-norm."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mosaic_jax.core import shapes
from mosaic_jax.core.types import Array


class BatchNorm(nn.Module):
    """Batch-norm (Ioffe and Szegedy, 2015) as in PyTorch, over all but the last axis.

    The running variance is unbiased, unlike that of flax's own module. Moments are
    float32 whatever the input. The mean and biased variance of the batch are sown into
    the collection "moments", a tree like "batch_stats", for losses that match
    statistics. In training the input is multiplied by `input_scale`; the running
    statistics are those of the input before that.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    input_scale: float = 1.0
    scale_init: Callable[..., Array] = nn.initializers.ones
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Normalise a batch.

        Args:
          x: [B, ..., F].
          train: whether to use, and update the running ones by, the batch's moments.
          mask: [B] bool, False for samples that do not count in them; None: all count.

        Returns:
          An array like `x`.
        """
        size = x.shape[-1]
        scale, bias = jnp.ones(size), jnp.zeros(size)
        if self.affine:
            scale = self.param("scale", self.scale_init, (size,))
            bias = self.param("bias", nn.initializers.zeros, (size,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (size,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (size,))

        dtype, x = x.dtype, x.astype(jnp.float32)
        if train:
            x = x * self.input_scale
        mean, var, count = _moments(x, mask)
        if not self.is_initializing():
            self.sow("moments", "mean", mean, init_fn=lambda: None, reduce_fn=_latest)
            self.sow("moments", "var", var, init_fn=lambda: None, reduce_fn=_latest)
        if not train:
            mean, var = running_mean.value, running_var.value
        elif not self.is_initializing():
            unbiased = var * count / jnp.maximum(count - 1, 1)
            by = self.input_scale
            running_mean.value = self._blend(running_mean.value, mean / by)
            running_var.value = self._blend(running_var.value, unbiased / by**2)
        factor = lax.rsqrt(var + self.epsilon) * scale
        rank = x.ndim
        mean, factor, bias = (shapes.last(each, rank) for each in (mean, factor, bias))
        return ((x - mean) * factor + bias).astype(dtype)

    def _blend(self, old: jax.Array, new: Array) -> jax.Array:
        return self.decay * old + (1 - self.decay) * lax.stop_gradient(new)


class GroupNorm(nn.Module):
    """Normalise each sample over groups of channels (Wu and He, 2018).

    It has no state. Clients need no common statistics, so federated studies often
    prefer it (Hsieh et al., 2020).
    """

    groups: int = 8
    epsilon: float = 1e-5
    input_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Normalise a batch.

        Args:
          x: [B, H, W, F].
          train: whether the input is multiplied by `input_scale`.
          mask: makes no difference.

        Returns:
          An array like `x`.
        """
        del mask
        if train:
            x = x * self.input_scale
        size = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (size,))
        bias = self.param("bias", nn.initializers.zeros, (size,))
        groups = min(self.groups, size)
        dtype, x = x.dtype, x.astype(jnp.float32)

        def mean(x: Array) -> Array:
            # Pixels first: sums over them are fast.
            channel = jnp.mean(x, (1, 2)).reshape(len(x), groups, -1)
            group = jnp.mean(channel, -1, keepdims=True)
            whole = jnp.broadcast_to(group, channel.shape)
            return whole.reshape(len(x), 1, 1, size)

        centred = x - mean(x)
        inverse = lax.rsqrt(mean(centred**2) + self.epsilon)
        scale, bias = shapes.last(scale, x.ndim), shapes.last(bias, x.ndim)
        return (centred * (inverse * scale) + bias).astype(dtype)


def cumulative(old: Array, new: Array, step: Array) -> Array:
    """The plain mean of a statistic over the batches 0, ..., `step`.

    Args:
      old: its mean over the batches before `step`; not used if `step` is 0.
      new: the exponential moving average that `BatchNorm` updated `old` to.
      step: [] int32, number of the batch.
    """
    latest = old + (new - old) / (1 - BatchNorm.decay)
    return old + (latest - old) / (step + 1)


NORMS = {"batch": BatchNorm, "group": GroupNorm}


def _latest(_: Any, value: Any) -> Any:
    return value


def _moments(x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    axes = tuple(range(x.ndim - 1))
    positions = x.size // (x.shape[0] * x.shape[-1])
    if mask is None:
        count = jnp.asarray(x.shape[0] * positions, x.dtype)
        return jnp.mean(x, axes), jnp.var(x, axes), count
    count = jnp.maximum(jnp.sum(mask), 1).astype(x.dtype) * positions
    mask = mask.reshape(-1, *[1] * (x.ndim - 1))
    mean = jnp.sum(jnp.where(mask, x, 0), axes) / count
    var = (
        jnp.sum(jnp.where(mask, (x - shapes.last(mean, x.ndim)) ** 2, 0), axes) / count
    )
    return mean, var, count
