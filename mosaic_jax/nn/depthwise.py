"""Depthwise convolutions, one kernel a channel, that stay fast for many clients.

Each has k^2 multiply-adds a pixel and no sums over channels: next to nothing to
compute. But XLA has no fast kernel for them on CPUs, and what automatic differentiation
makes of them, in the kernel above all, is slower by orders of magnitude. So the three
linear maps are written as sums of shifted products, which are fused into one pass over
the maps. docs/performance.md has what was measured.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mosaic_jax.core import flops, programs
from mosaic_jax.core.types import Array
from mosaic_jax.nn.conv import Geometry, Initializer


def depthwise(
    x: Array, kernel: Array, stride: int, padding: int, lowering: str = "auto"
) -> Array:
    """Cross-correlate each channel of zero-padded maps with a kernel of its own.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C], of the same type.
      stride: in both directions.
      padding: zeros on each side.
      lowering: one of `conv.LOWERINGS`, what `vmap` over kernels makes of it: "grouped"
        is one grouped convolution whose groups are the channels of all clients, "dense"
        products of one client after the other, "patches" those of all at once; "auto"
        is the last on accelerators and "dense" on CPUs.

    Returns:
      [B, (H + 2 padding - k) // stride + 1, likewise for W, C].
    """
    height, width = x.shape[1:3]
    form = len(kernel), stride, padding, lowering, programs.platform()
    geometry = Geometry((height, width), *form)
    if flops.counting():  # products of single numbers are not counted
        return _native(geometry, jnp.asarray(x), jnp.asarray(kernel))
    return _linear(geometry, x, kernel)


class Depthwise(nn.Module):
    """Depthwise convolution without bias in the type of its input.

    Its `kernel` is [k, k, 1, channels]; the padding keeps the size of maps at stride 1.
    """

    size: int
    stride: int
    kernel_init: Initializer
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        padding = (self.size - 1) // 2
        return depthwise(x, kernel, self.stride, padding, self.lowering)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _op(forward, geometry)(x, kernel)


def _linear_fwd(geometry: Geometry, x: jax.Array, kernel: jax.Array):
    return _linear(geometry, x, kernel), (x, kernel)


def _linear_bwd(geometry: Geometry, saved: tuple, g: jax.Array):
    x, kernel = saved
    return _op(on_input, geometry)(g, kernel), _op(on_kernel, geometry)(x, g)


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.cache
def _op(
    function: Callable[..., jax.Array], geometry: Geometry
) -> Callable[..., jax.Array]:
    """`function(geometry, a, b)` of two arrays, with the rule for `vmap`."""
    plain = functools.partial(function, geometry)
    lowering = geometry.lowering
    if lowering == "auto":
        lowering = "dense" if geometry.on_cpu else "patches"
    if lowering == "patches":
        return plain
    op = jax.custom_batching.custom_vmap(plain)

    @op.def_vmap
    def rule(count: int, batched: list[bool], a: jax.Array, b: jax.Array):
        a, b = (
            v if has else jnp.broadcast_to(v, (count, *v.shape))
            for v, has in zip((a, b), batched, strict=True)
        )
        if lowering == "dense":
            return lax.map(lambda pair: op(*pair), (a, b)), True
        # No channel sees another: those of all clients are those of one.
        y = op(*(jnp.moveaxis(v, 0, -2).reshape(*v.shape[1:-1], -1) for v in (a, b)))
        return jnp.moveaxis(y.reshape(*y.shape[:-1], count, -1), -2, 0), True

    return op


def _native(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        [(geometry.padding, geometry.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def forward(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution.

    Args:
      geometry: of it.
      x: maps [B, H, W, C].
      kernel: [k, k, 1, C].

    Returns:
      [B, h, w, C].
    """
    if geometry.lowering == "grouped":
        return _native(geometry, x, kernel)
    shifts, taps = _shifts(geometry, x), kernel.astype(jnp.float32)
    total = sum(shift * taps[i, j][None, None] for (i, j), shift in shifts.items())
    return jnp.asarray(total).astype(x.dtype)


def on_input(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transpose in the maps, from [B, h, w, C] to [B, H, W, C].

    Row stride * m + r of the result sees, by tap t, row m + (r + padding - t) / stride
    of `g`, where that is a whole number: rows of one r have the same taps.

    Args:
      geometry: of the convolution.
      g: [B, h, w, C].
      kernel: [k, k, 1, C].
    """
    stride, size, padding = geometry.stride, geometry.size, geometry.padding
    if geometry.lowering == "grouped":
        x = jax.ShapeDtypeStruct((len(g), *geometry.side, g.shape[-1]), g.dtype)
        return jax.linear_transpose(lambda x: _native(geometry, x, kernel), x)(g)[0]
    height, width = (-(-side // stride) for side in geometry.side)
    furthest = (stride - 1 + padding) // stride
    ends = [
        (size - 1, max(0, count + furthest - out))
        for count, out in zip((height, width), geometry.out, strict=True)
    ]
    g_wide = _padded(g, ends).astype(jnp.float32)
    taps = kernel.astype(jnp.float32)

    def used(phase: int) -> list[tuple[int, int]]:
        """The taps that rows of one phase see, and the first row of `g` for each."""
        first = (phase + padding) % stride
        return [
            (tap, size - 1 + (phase + padding - tap) // stride)
            for tap in range(first, size, stride)
        ]

    def one(row: int, column: int) -> jax.Array:
        total = jnp.zeros((len(g), height, width, g.shape[-1]))
        for i, top in used(row):
            for j, left in used(column):
                part = g_wide[:, top : top + height, left : left + width]
                total += part * taps[i, j][None, None]
        return total.astype(g.dtype)

    if stride == 1:
        return one(0, 0)
    phases = [
        jnp.stack([one(row, column) for column in range(stride)], axis=3)
        for row in range(stride)
    ]
    x = jnp.stack(phases, axis=2)  # [B, rows, stride, columns, stride, C]
    x = x.reshape(len(g), height * stride, width * stride, -1)
    return x[:, : geometry.side[0], : geometry.side[1]]


def on_kernel(geometry: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose in the kernel, [k, k, 1, C].

    Args:
      geometry: of the convolution.
      x: maps [B, H, W, C].
      g: [B, h, w, C].
    """
    size = geometry.size
    if geometry.lowering == "grouped":
        kernel = jax.ShapeDtypeStruct((size, size, 1, g.shape[-1]), g.dtype)
        transpose = jax.linear_transpose(lambda k: _native(geometry, x, k), kernel)
        return transpose(g)[0]
    sums = [
        jnp.sum(shift * g.astype(jnp.float32), axis=(0, 1, 2))
        for shift in _shifts(geometry, x).values()
    ]
    return jnp.stack(sums).reshape(size, size, 1, -1).astype(g.dtype)


def _shifts(geometry: Geometry, x: jax.Array) -> dict[tuple[int, int], jax.Array]:
    """What each tap of the kernel sees, [B, h, w, C] float32, by row and column."""
    size, stride, padding = geometry.size, geometry.stride, geometry.padding
    height, width = geometry.out
    x = _padded(x, [(padding, padding)] * 2)
    return {
        (i, j): x[
            :,
            i : i + stride * (height - 1) + 1 : stride,
            j : j + stride * (width - 1) + 1 : stride,
        ].astype(jnp.float32)
        for i in range(size)
        for j in range(size)
    }


def _padded(x: jax.Array, ends: list[tuple[int, int]]) -> jax.Array:
    """`x` [B, H, W, C] with zeros before and after its rows and columns."""
    # Behind the barrier it is computed once, not again for each tap.
    return lax.optimization_barrier(jnp.pad(x, ((0, 0), *ends, (0, 0))))
