"""Convolutions that stay fast when every client has its own kernels.

Two things make a plain convolution slow here. Under `vmap` over kernels XLA lowers it
to a grouped one. And on CPUs the gradient convolutions of automatic differentiation,
whose operands are transposed, miss the fast kernels inside a loop (20 to 90 times
slower). So convolutions are built from three linear maps, each written in a form that
XLA has a fast kernel for, each with its own rule for `vmap`:

    forward    (x, kernel) -> y
    on_input   (g, kernel) -> x     the transpose in x: gradient, and ConvTranspose
    on_kernel  (x, g) -> kernel     the transpose in the kernel

docs/performance.md has what was tried and measured.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mosaic_jax.core.types import Array

LOWERINGS = ("auto", "grouped", "dense", "patches")

Initializer = Callable[..., Array]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Patches of so many bytes stay in a core's share of the cache (measured).
_TILE_BYTES = 5_000_000
# On smaller maps one matrix product over all clients fills an accelerator better than
# a convolution per client; an estimate from the number of thread blocks.
_SMALL_MAP = 64


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about a convolution but its arrays.

    Attributes:
      side: height and width of the input map.
      size: side length of the square kernel.
      stride: in both directions.
      padding: zeros on each side.
      lowering: one of `LOWERINGS`: "grouped" leaves `vmap` to XLA, "dense" runs one
        dense convolution per kernel, "patches" multiplies matrices of patches, "auto"
        is the fastest measured for the backend and the shape.
    """

    side: tuple[int, int]
    size: int
    stride: int
    padding: int
    lowering: str

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output map."""
        reach = 2 * self.padding - self.size
        height, width = ((side + reach) // self.stride + 1 for side in self.side)
        return height, width


def convolve(
    x: Array, kernel: Array, stride: int, padding: int, lowering: str = "auto"
) -> Array:
    """Cross-correlate zero-padded maps with a kernel.

    Args:
      x: [B, H, W, I].
      kernel: [k, k, I, O], of the same type.
      stride: in both directions.
      padding: zeros on each side.
      lowering: one of `LOWERINGS`, see `Geometry`.

    Returns:
      [B, (H + 2 padding - k) // stride + 1, likewise for W, O].
    """
    height, width = x.shape[1:3]
    geometry = Geometry((height, width), len(kernel), stride, padding, lowering)
    return _linear(False, geometry, x, kernel)


def convolve_transpose(
    x: Array, kernel: Array, stride: int, padding: int, lowering: str = "auto"
) -> Array:
    """Transpose of `convolve`, with the shapes of PyTorch's ConvTranspose2d.

    Args:
      x: [B, H, W, I].
      kernel: [k, k, O, I], of the same type.
      stride: in both directions.
      padding: zeros on each side of the result, as in the transposed convolution.
      lowering: one of `LOWERINGS`, see `Geometry`.

    Returns:
      [B, (H - 1) stride - 2 padding + k, likewise for W, O].
    """
    reach = len(kernel) - 2 * padding
    height, width = ((n - 1) * stride + reach for n in x.shape[1:3])
    geometry = Geometry((height, width), len(kernel), stride, padding, lowering)
    return _linear(True, geometry, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
    transposed: bool, geometry: Geometry, a: jax.Array, kernel: jax.Array
) -> jax.Array:
    return _op(_on_input if transposed else _forward, geometry)(a, kernel)


def _linear_fwd(transposed: bool, geometry: Geometry, a: jax.Array, kernel: jax.Array):
    return _linear(transposed, geometry, a, kernel), (a, kernel)


def _linear_bwd(transposed: bool, geometry: Geometry, saved: tuple, g: jax.Array):
    a, kernel = saved
    x, y = (g, a) if transposed else (a, g)
    on_a = _linear(not transposed, geometry, g, kernel)
    return on_a, _op(_on_kernel, geometry)(x, y)


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.cache
def _op(
    function: Callable[..., jax.Array], geometry: Geometry
) -> Callable[..., jax.Array]:
    """`function(geometry, a, b)` of two arrays, with the rule for `vmap`."""
    plain = functools.partial(function, geometry)
    if geometry.lowering in ("grouped", "patches"):
        return plain
    op = jax.custom_batching.custom_vmap(plain)

    @op.def_vmap
    def rule(count: int, batched: list[bool], a: jax.Array, b: jax.Array):
        if function is not _on_kernel and not batched[1]:
            # One kernel for all: the clients are more samples.
            y = op(a.reshape(-1, *a.shape[2:]), b)
            return y.reshape(count, -1, *y.shape[1:]), True
        a, b = (
            v if has else jnp.broadcast_to(v, (count, *v.shape))
            for v, has in zip((a, b), batched, strict=True)
        )
        if _on_cpu():
            return lax.map(lambda pair: op(*pair), (a, b)), True
        if geometry.lowering == "auto" and geometry.out[0] ** 2 <= _SMALL_MAP:
            by_patches = dataclasses.replace(geometry, lowering="patches")
            return jax.vmap(_op(function, by_patches))(a, b), True
        return jnp.stack([op(a[i], b[i]) for i in range(count)]), True

    return op


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _by_patches(geometry: Geometry) -> bool:
    if geometry.lowering == "patches" or geometry.size == 1 or geometry.out == (1, 1):
        return True
    # On CPUs one matrix product is faster for maps of two rows as well (measured).
    return _on_cpu() and max(geometry.out) <= 2


def _native(x: jax.Array, kernel: jax.Array, stride: int, pads: list) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=_DIMENSIONS
    )


def _forward(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if _by_patches(geometry):
        return _patches(geometry, x) @ kernel.reshape(-1, kernel.shape[-1])
    pads = [(geometry.padding,) * 2] * 2
    return _native(x, kernel, geometry.stride, pads)


def _on_input(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    if _on_cpu() and not _by_patches(geometry):
        return _by_phases(geometry, g, kernel)
    shape = (len(g), *geometry.side, kernel.shape[2])
    x = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda x: _forward(geometry, x, kernel), x)(g)[0]


def _by_phases(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_on_input` as stride^2 convolutions, one for each position modulo the stride.

    Output rows stride * m + r see only the taps t = r + padding (mod stride), row
    m - (t - r - padding) / stride of `g` each: a convolution of stride 1.
    """
    stride = geometry.stride
    sizes = [-(-side // stride) for side in geometry.side]
    kernel = kernel.swapaxes(2, 3)

    def taps(phase: int, length: int, count: int) -> tuple[range, tuple[int, int]]:
        """The taps of a phase, and the padding that they need."""
        first = (phase + geometry.padding) % stride
        used = range(first, geometry.size, stride)
        low = (used[-1] - phase - geometry.padding) // stride if used else 0
        return used, (low, length + len(used) - 1 - count - low)

    def one(row: int, column: int) -> jax.Array:
        (rows, high), (columns, wide) = (
            taps(phase, length, count)
            for phase, length, count in zip(
                (row, column), sizes, g.shape[1:3], strict=True
            )
        )
        if not rows or not columns:
            return jnp.zeros((len(g), *sizes, kernel.shape[-1]), g.dtype)
        taken = kernel[rows[0] :: stride, columns[0] :: stride][::-1, ::-1]
        return _native(g, taken, 1, [high, wide])

    if stride == 1:
        return one(0, 0)
    phases = [
        jnp.stack([one(row, column) for column in range(stride)], axis=3)
        for row in range(stride)
    ]
    x = jnp.stack(phases, axis=2)  # [B, rows, stride, columns, stride, I]
    x = x.reshape(len(g), *(n * stride for n in sizes), kernel.shape[-1])
    return x[:, : geometry.side[0], : geometry.side[1]]


def _on_kernel(geometry: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
    shape = (geometry.size, geometry.size, x.shape[-1], g.shape[-1])
    if not _on_cpu() and not _by_patches(geometry):
        kernel = jax.ShapeDtypeStruct(shape, g.dtype)
        transpose = jax.linear_transpose(lambda k: _forward(geometry, x, k), kernel)
        return transpose(g)[0]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        samples = ((0, 1, 2), (0, 1, 2))
        return lax.dot_general(
            a, b, (samples, ((), ())), preferred_element_type=jnp.float32
        )

    tile = _tile(geometry, x)
    if tile == len(x):
        return product(_patches(geometry, x), g).reshape(shape).astype(g.dtype)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        x_part, g_part = (lax.dynamic_slice_in_dim(v, i * tile, tile) for v in (x, g))
        # XLA transposes the left operand: the smaller one.
        return total + product(g_part, _patches(geometry, x_part))

    zero = jnp.zeros((g.shape[-1], geometry.size**2 * x.shape[-1]))
    total = lax.fori_loop(0, len(x) // tile, body, zero)
    return total.T.reshape(shape).astype(g.dtype)


def _tile(geometry: Geometry, x: jax.Array) -> int:
    """Number of samples whose patches fit in the cache; divides the batch size."""
    height, width = geometry.out
    each = height * width * geometry.size**2 * x.shape[-1] * x.dtype.itemsize
    tile = len(x)
    while tile % 2 == 0 and tile * each > _TILE_BYTES and _on_cpu():
        tile //= 2
    return tile


def _patches(geometry: Geometry, x: jax.Array) -> jax.Array:
    """Patches [B, h, w, size * size * I] of `x` [B, H, W, I], flat as kernels are."""
    size, stride, padding = geometry.size, geometry.stride, geometry.padding
    height, width = geometry.out
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def shifted(row: int, column: int) -> jax.Array:
        rows = slice(row, row + stride * (height - 1) + 1, stride)
        columns = slice(column, column + stride * (width - 1) + 1, stride)
        return x[:, rows, columns]

    shifts = [shifted(i, j) for i in range(size) for j in range(size)]
    return shifts[0] if size == 1 else jnp.concatenate(shifts, axis=-1)


class Conv(nn.Module):
    """Convolution without bias in the type of its input; `kernel` [k, k, in, out]."""

    features: int
    size: int
    stride: int
    padding: int
    kernel_init: Initializer
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        return convolve(x, kernel, self.stride, self.padding, self.lowering)


class ConvTranspose(nn.Module):
    """Transposed convolution without bias; `kernel` [k, k, out, in]."""

    features: int
    size: int
    stride: int
    padding: int
    kernel_init: Initializer
    lowering: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, self.features, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape).astype(x.dtype)
        return convolve_transpose(x, kernel, self.stride, self.padding, self.lowering)
