"""Normalisation: batch-norm with PyTorch's running statistics, group, layer."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mosaic_jax.core import programs, shapes
from mosaic_jax.core.types import Array

# Pixels that are summed up first; see `_sums`.
_MOST_SUMMED = 256


class BatchNorm(nn.Module):
    """Batch-norm (Ioffe and Szegedy, 2015) as in PyTorch, over all but the last axis.

    The running variance is unbiased, unlike that of flax's own module. Moments are
    float32 whatever the input. The mean and biased variance of the batch are sown into
    the collection "moments", a tree like "batch_stats", for losses that match
    statistics. In training the input is multiplied by `input_scale`; the running
    statistics are those of the input before that. A leaky ReLU of `slope` follows, ReLU
    for 0, nothing for None: along with it the gradient keeps the input alone.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    input_scale: float = 1.0
    slope: float | None = None
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

        by = self.input_scale if train else 1.0
        form = _Form(self.epsilon, by, self.slope)
        told = not self.is_initializing() and self.is_mutable_collection("moments")
        if train:
            found: Any = _batch_norm(form, x, mask, scale, bias)
        else:
            factor = lax.rsqrt(running_var.value + self.epsilon) * scale
            given = running_mean.value, factor, bias
            found = _scaled(form, told, x, mask, *given)
        y, *moments = found
        if told:
            for name, value in zip(("mean", "var"), moments, strict=True):
                self.sow(
                    "moments", name, value, init_fn=lambda: None, reduce_fn=_latest
                )
        if train and not self.is_initializing():
            (mean, var), count = moments, _count(x, mask)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            running_mean.value = self._blend(running_mean.value, mean / by)
            running_var.value = self._blend(running_var.value, unbiased / by**2)
        return y

    def _blend(self, old: jax.Array, new: Array) -> jax.Array:
        return self.decay * old + (1 - self.decay) * lax.stop_gradient(new)


class GroupNorm(nn.Module):
    """Normalise each sample over groups of channels (Wu and He, 2018).

    It has no state. Clients need no common statistics, so federated studies often
    prefer it (Hsieh et al., 2020). There are `groups` groups, or as many below that as
    divide the channels. `slope` is that of a leaky ReLU that follows.
    """

    groups: int = 8
    epsilon: float = 1e-5
    input_scale: float = 1.0
    slope: float | None = None

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
        groups = max(n for n in range(1, self.groups + 1) if size % n == 0)
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
        y = centred * (inverse * scale) + bias
        return activate(y, self.slope).astype(dtype)


class LayerNorm(GroupNorm):
    """Normalise each sample over all its channels and pixels (Ba et al., 2016).

    It is group-norm of one group. In transformers each token is a sample.
    """

    groups: int = 1


def cumulative(old: Array, new: Array, step: Array) -> Array:
    """The plain mean of a statistic over the batches 0, ..., `step`.

    Args:
      old: its mean over the batches before `step`; not used if `step` is 0.
      new: the exponential moving average that `BatchNorm` updated `old` to.
      step: [] int32, number of the batch.
    """
    latest = old + (new - old) / (1 - BatchNorm.decay)
    return old + (latest - old) / (step + 1)


NORMS = {"batch": BatchNorm, "group": GroupNorm, "layer": LayerNorm}


def _latest(_: Any, value: Any) -> Any:
    return value


def activate(x: Array, slope: float | None) -> Array:
    """Leaky ReLU; a slope of 0 is ReLU, None is the identity."""
    return x if slope is None else jnp.where(x > 0, x, slope * x)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """ReLU whose gradient needs its result alone, which the next layer keeps anyway."""
    # Behind the barrier it is computed once, not again for each of its readers.
    return lax.optimization_barrier(jnp.maximum(x, 0))


def _relu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = relu(x)
    return y, y


def _relu_bwd(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is fixed of a batch-norm layer: see `BatchNorm`."""

    epsilon: float
    input_scale: float
    slope: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scaled(
    form: _Form,
    told: bool,
    x: Array,
    mask: Array | None,
    mean: Array,
    factor: Array,
    bias: Array,
) -> tuple[Array, ...]:
    """Normalise `x` [B, ..., F] by given statistics; where `told`, also its own [F]."""
    y = activate(_affine(x, mean, factor, bias), form.slope).astype(x.dtype)
    return (y, *_moments(x, mask)) if told else (y,)


def _scaled_fwd(form: _Form, told: bool, x, mask, *given):
    result: Any = _scaled(form, told, x, mask, *given)
    return result, (x, mask, *given, *result[1:])


def _scaled_bwd(form: _Form, told: bool, saved: tuple, cotangent: tuple):
    x, mask, mean, factor, bias, *moments = saved
    x, g = _anew(form, x, cotangent[0])
    wide, grad = _read(form, x, g, mean, factor, bias)
    total, product = _sums(None, grad, grad * (wide - shapes.last(mean, x.ndim)))
    on_x = grad * shapes.last(factor, x.ndim)
    if told:
        on_x = on_x + _of_moments(wide, mask, moments[0], *cotangent[1:])
    on_x = on_x.astype(x.dtype)
    return on_x, None, -factor * total, product, total


_scaled.defvjp(_scaled_fwd, _scaled_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(
    form: _Form,
    x: Array,
    mask: Array | None,
    scale: Array,
    bias: Array,
) -> tuple[Array, Array, Array]:
    """Normalise `x` [B, ..., F] by its own moments; these are returned too, [F] each.

    Each activation is read and written as few times as can be without fusing the
    convolutions: `x` is read twice and the result written; backward, `x` and the
    gradient are read twice and the result is written.
    """
    mean, var = _moments(x, mask)
    mean, var = mean * form.input_scale, var * form.input_scale**2
    wide = x.astype(jnp.float32) * form.input_scale
    factor = lax.rsqrt(var + form.epsilon) * scale
    y = activate(_affine(wide, mean, factor, bias), form.slope)
    return y.astype(x.dtype), mean, var


def _batch_norm_fwd(form: _Form, x, mask, scale, bias):
    result: Any = _batch_norm(form, x, mask, scale, bias)
    y, mean, var = result
    return (y, mean, var), (x, mask, scale, bias, mean, var)


def _batch_norm_bwd(form: _Form, saved: tuple, cotangent: tuple):
    x, mask, scale, bias, mean, var = saved
    g, on_mean, on_var = cotangent
    inverse = lax.rsqrt(var + form.epsilon)
    factor = inverse * scale
    x, g = _anew(form, x, g)
    wide, grad = _read(form, x, g, mean, factor, bias)
    total, product = _sums(None, grad, grad * (wide - shapes.last(mean, x.ndim)))
    x, g, total, product = lax.optimization_barrier((x, g, total, product))
    wide, grad = _read(form, x, g, mean, factor, bias)
    on_mean = on_mean - factor * total
    on_var = on_var - 0.5 * scale * inverse**3 * product
    on_x = grad * shapes.last(factor, x.ndim)
    on_x = on_x + _of_moments(wide, mask, mean, on_mean, on_var)
    on_x = (on_x * form.input_scale).astype(x.dtype)
    return on_x, None, product * inverse, total


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def _anew(form: _Form, x: Array, g: Array) -> tuple[Array, Array]:
    """The stored input and the gradient, behind a barrier.

    All is computed anew from what is stored; otherwise XLA keeps intermediates, as
    large as `x`, from one use to the next. Where `g` is no result of a convolution,
    sums over it are computed along with it.
    """
    if form.slope is None:
        return lax.optimization_barrier(x), g
    return lax.optimization_barrier((x, g))


def _read(
    form: _Form, x: Array, g: Array, mean: Array, factor: Array, bias: Array
) -> tuple[Array, Array]:
    """The scaled input, and the gradient before the activation, in float32."""
    wide, grad = x.astype(jnp.float32) * form.input_scale, g.astype(jnp.float32)
    if form.slope is not None:
        above = _affine(wide, mean, factor, bias) > 0
        grad = jnp.where(above, grad, form.slope * grad)
    return wide, grad


def _affine(x: Array, mean: Array, factor: Array, bias: Array) -> Array:
    """`(x - mean) * factor + bias` in float32, of `x` [..., F] and the rest [F]."""
    mean, factor, bias = (shapes.last(each, x.ndim) for each in (mean, factor, bias))
    return (x.astype(jnp.float32) - mean) * factor + bias


def _count(x: Array, mask: Array | None) -> Array:
    """Number [] of values that each channel's moments are made of."""
    samples = len(x) if mask is None else jnp.maximum(jnp.sum(mask), 1)
    return jnp.asarray(samples, jnp.float32) * math.prod(x.shape[1:-1])


def _sums(mask: Array | None, *arrays: Array) -> list[Array]:
    """Sums [F] of each array [B, ..., F], over the samples that `mask` counts.

    Rows of large maps come first, or all pixels of small ones: for accelerators, sums
    over all axes at once are too few to keep them busy, and XLA stores what it sums up.
    """
    pixels = range(1, arrays[0].ndim - 1)
    if programs.platform() == "cpu":
        # Whole rows are added up: long vectors, also where channels are few.
        pixels = pixels[:1]
    while math.prod(arrays[0].shape[axis] for axis in pixels) > _MOST_SUMMED:
        pixels = pixels[1:]
    parts = [jnp.sum(each, tuple(pixels)) for each in arrays]
    parts = lax.optimization_barrier(parts)  # otherwise XLA merges the two sums
    if mask is not None:
        counts = mask.reshape(-1, *[1] * (parts[0].ndim - 1))
        parts = [jnp.where(counts, each, 0) for each in parts]
    return [jnp.sum(each, tuple(range(each.ndim - 1))) for each in parts]


def _moments(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Mean and biased variance [F] of `x` [B, ..., F], which is read once.

    The sums are those of the distance, and its square, from the mean of a first row of
    pixels: about as far from the mean as others are, so little is lost by cancellation.
    """
    row = x[(0,) * (x.ndim - 2)] if x.ndim > 2 else x[:1]
    first = jnp.mean(row.astype(jnp.float32), axis=0)
    if mask is not None:
        first = jnp.where(mask[0], first, 0)
    centred = x.astype(jnp.float32) - shapes.last(first, x.ndim)
    count = _count(x, mask)
    mean, square = (each / count for each in _sums(mask, centred, centred**2))
    return mean + first, jnp.maximum(square - mean**2, 0)


def _of_moments(
    x: Array, mask: Array | None, mean: Array, on_mean: Array, on_var: Array
) -> Array:
    """Gradient in `x` [B, ..., F], from those in its mean and variance [F]."""
    count = _count(x, mask)
    on_mean, on_var = (shapes.last(each / count, x.ndim) for each in (on_mean, on_var))
    on_x = on_mean + 2 * on_var * (x - shapes.last(mean, x.ndim))
    if mask is None:
        return on_x
    return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), on_x, 0)
