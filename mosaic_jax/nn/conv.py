"""Convolutions that stay fast when every client has its own kernels.

A plain convolution is slow here in three ways. Under `vmap` over kernels XLA lowers it
to a grouped one, which CPUs have no fast kernel for. On accelerators a grouped one is
right, but what `vmap` makes of its gradient in the kernel has kernels as large as the
maps. And on CPUs the gradient convolutions of automatic differentiation, whose operands
are transposed, miss the fast kernels inside a loop (20 to 90 times slower). So
convolutions are built from three linear maps, each written in a form that XLA has a
fast kernel for, each with its own rule for `vmap`:

    forward    (x, kernel) -> y
    on_input   (g, kernel) -> x     the transpose in x: gradient, and ConvTranspose
    on_kernel  (x, g) -> kernel     the transpose in the kernel

The rule makes one program of any number of clients: it does not grow with them.
docs/performance.md has what was tried, measured on CPUs and counted for accelerators.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mosaic_jax.core import flops, programs, sharing
from mosaic_jax.core.types import Array

LOWERINGS = ("auto", "grouped", "dense", "patches")

Initializer = Callable[..., Array]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Patches of so many bytes stay in a core's share of the cache (measured).
_TILE_BYTES = 5_000_000
# Numbers in a vector of a CPU: pixels of half as many, or fewer, are put together
# (measured).
_VECTOR = 16


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about a convolution but its arrays.

    Attributes:
      side: height and width of the input map.
      size: side length of the square kernel.
      stride: in both directions.
      padding: zeros on each side.
      lowering: one of `LOWERINGS`, what `vmap` over kernels makes of it: "grouped" is
        one grouped convolution, "dense" one dense convolution after the other,
        "patches" a batched product of matrices of patches; "auto" is the first on
        accelerators and the second on CPUs.
      platform: of the devices that it is for, see `programs.platform`.
    """

    side: tuple[int, int]
    size: int
    stride: int
    padding: int
    lowering: str
    platform: str

    @property
    def on_cpu(self) -> bool:
        """Whether it is for CPUs."""
        return self.platform == "cpu"

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
    form = len(kernel), stride, padding, lowering, programs.platform()
    return _linear(False, Geometry((height, width), *form), x, kernel)


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
    form = len(kernel), stride, padding, lowering, programs.platform()
    return _linear(True, Geometry((height, width), *form), x, kernel)


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
    return on_a, _product_of(geometry, x, y)


_linear.defvjp(_linear_fwd, _linear_bwd)


# With a gradient of its own, which is made of the other two maps, gradients have
# gradients: gradient inversion needs them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_of(geometry: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
    return _op(_on_kernel, geometry)(x, g)


def _product_of_fwd(geometry: Geometry, x: jax.Array, g: jax.Array):
    return _product_of(geometry, x, g), (x, g)


def _product_of_bwd(geometry: Geometry, saved: tuple, kernel: jax.Array):
    x, g = saved
    on_x = _linear(True, geometry, g, kernel)
    return on_x, _linear(False, geometry, x, kernel)


_product_of.defvjp(_product_of_fwd, _product_of_bwd)


@functools.cache
def _op(
    function: Callable[..., jax.Array], geometry: Geometry
) -> Callable[..., jax.Array]:
    """`function(geometry, a, b)` of two arrays, with the rule for `vmap`."""
    plain = functools.partial(function, geometry)
    if geometry.lowering == "patches":
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
        if geometry.lowering == "dense" or (
            geometry.lowering == "auto" and geometry.on_cpu
        ):
            if function is _on_kernel and a.shape[1] == 1:
                # Gradients of single samples, which are too small for a loop.
                return _of_samples(geometry, a[:, 0], b[:, 0]), True
            return lax.map(lambda pair: op(*pair), (a, b)), True
        if geometry.out == (1, 1):
            return jax.vmap(plain)(a, b), True
        return _grouped(function, geometry, a, b), True

    return op


def _grouped(
    function: Callable[..., jax.Array], geometry: Geometry, a: jax.Array, b: jax.Array
) -> jax.Array:
    """`function` of each pair of entries of `a` and `b`, as one grouped convolution.

    Clients lie next to the channels, [B, H, W, G C], in all of them, so that nothing is
    moved between one layer and the next.
    """
    groups = len(a)

    def fold(x: jax.Array) -> jax.Array:
        """[G, ..., C] to [..., G C]."""
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)

    def unfold(x: jax.Array) -> jax.Array:
        """[..., G C] to [G, ..., C]."""
        x = x.reshape(*x.shape[:-1], groups, -1)
        return jnp.moveaxis(x, -2, 0)

    pads = [(geometry.padding,) * 2] * 2
    if function is _forward:
        return unfold(_native(fold(a), fold(b), geometry.stride, pads, groups))
    # Behind barriers the layout of kernels, and of gradients in them, is changed apart
    # from the optimiser's update, which can then be made in place.
    if function is _on_input:
        kernel = lax.optimization_barrier(b).swapaxes(3, 4)
        return unfold(_by_phases(geometry, fold(a), fold(kernel), groups))
    x, g = fold(a), fold(b)
    kernel = jax.ShapeDtypeStruct(
        (geometry.size, geometry.size, a.shape[-1], g.shape[-1]), g.dtype
    )
    transpose = jax.linear_transpose(
        lambda kernel: _native(x, kernel, geometry.stride, pads, groups), kernel
    )
    return lax.optimization_barrier(unfold(transpose(g)[0]))


def _by_patches(geometry: Geometry) -> bool:
    if geometry.lowering == "patches" or geometry.size == 1 or geometry.out == (1, 1):
        return True
    # On CPUs one matrix product is faster for maps of two rows as well (measured).
    return geometry.on_cpu and max(geometry.out) <= 2


def _native(
    x: jax.Array, kernel: jax.Array, stride: int, pads: list, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def _forward(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if _by_patches(geometry):
        return _patches(geometry, x) @ kernel.reshape(-1, kernel.shape[-1])
    if _narrow(geometry, kernel.shape[3]):
        stride, low = geometry.stride, geometry.padding
        return _product(x, kernel, stride, low, geometry.out)
    pads = [(geometry.padding,) * 2] * 2
    return _native(x, kernel, geometry.stride, pads)


def _on_input(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    if _narrow(geometry, kernel.shape[2]):
        return _phases_at_once(geometry, g, kernel)
    if geometry.on_cpu and not _by_patches(geometry):
        return _by_phases(geometry, g, kernel.swapaxes(2, 3))
    shape = (len(g), *geometry.side, kernel.shape[2])
    x = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda x: _forward(geometry, x, kernel), x)(g)[0]


def _by_phases(
    geometry: Geometry, g: jax.Array, kernel: jax.Array, groups: int = 1
) -> jax.Array:
    """`_on_input` as stride^2 convolutions, one for each position modulo the stride.

    The kernel's input and output are swapped: [k, k, O, groups I].

    Output rows stride * m + r see only the taps t = r + padding (mod stride), row
    m - (t - r - padding) / stride of `g` each: a convolution of stride 1.
    """
    stride = geometry.stride
    sizes = [-(-side // stride) for side in geometry.side]

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
        return _native(g, taken, 1, [high, wide], groups)

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
    narrow = geometry.stride == 1 and _narrow(geometry, g.shape[-1])
    if narrow or not (geometry.on_cpu or _by_patches(geometry)):
        kernel = jax.ShapeDtypeStruct(shape, g.dtype)
        transpose = jax.linear_transpose(lambda k: _forward(geometry, x, k), kernel)
        return transpose(g)[0]
    # Tiles lie within one device's part of a batch, and the parts are added up once.
    devices = sharing.num_devices()
    parts = devices if len(x) % devices == 0 else 1
    if parts == 1:
        return _by_tiles(geometry, x, g).astype(g.dtype)
    x, g = (v.reshape(parts, -1, *v.shape[1:]) for v in (x, g))
    each = jax.vmap(functools.partial(_by_tiles, geometry))(x, g)
    return jnp.sum(each, axis=0).astype(g.dtype)


def _by_tiles(geometry: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
    """`_on_kernel` in float32, tile by tile of the batch, as products of patches."""
    shape = (geometry.size, geometry.size, x.shape[-1], g.shape[-1])

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        samples = ((0, 1, 2), (0, 1, 2))
        return lax.dot_general(
            a, b, (samples, ((), ())), preferred_element_type=jnp.float32
        )

    tile = _tile(geometry, x)
    if tile == len(x):
        return product(_patches(geometry, x), g).reshape(shape)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        x_part, g_part = (lax.dynamic_slice_in_dim(v, i * tile, tile) for v in (x, g))
        # XLA transposes the left operand: the smaller one.
        return total + product(g_part, _patches(geometry, x_part))

    zero = jnp.zeros((g.shape[-1], geometry.size**2 * x.shape[-1]))
    total = lax.fori_loop(0, len(x) // tile, body, zero)
    return total.T.reshape(shape)


def _of_samples(geometry: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
    """`_on_kernel` of each sample of `x` and `g` by itself, [B, k, k, I, O]."""
    patches = _patches(geometry, x)
    kernels = jnp.einsum("bhwi,bhwo->bio", patches, g)
    size, depth = geometry.size, (x.shape[-1], g.shape[-1])
    return kernels.reshape(len(x), size, size, *depth)


def _tile(geometry: Geometry, x: jax.Array) -> int:
    """Number of samples whose patches fit in the cache; divides the batch size."""
    height, width = geometry.out
    each = height * width * geometry.size**2 * x.shape[-1] * x.dtype.itemsize
    tile = len(x)
    while tile % 2 == 0 and tile * each > _TILE_BYTES and geometry.on_cpu:
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


def _narrow(geometry: Geometry, channels: int) -> bool:
    """Whether results of so few `channels` are worth a product of their own on CPUs."""
    if geometry.lowering != "auto" or _by_patches(geometry) or flops.counting():
        return False
    return geometry.on_cpu and 2 * channels <= _VECTOR


def _product(
    x: jax.Array, kernel: jax.Array, stride: int, low: int, out: tuple[int, int]
) -> jax.Array:
    """Cross-correlation as one matrix product, for results of few channels.

    At stride 1 as many neighbours in a row as fill a vector make a block. They share a
    window of `x`, little larger than that of one pixel, and the kernel stands at the
    place of each of them, among zeros.

    Args:
      x: [B, H, W, I].
      kernel: [k, k, I, O].
      stride: in both directions.
      low: zeros before the first row and column; as many follow as `out` takes.
      out: height and width of the result.

    Returns:
      [B, height, width, O].
    """
    (height, width), (size, _, depth, channels) = out, kernel.shape
    block = max(1, _VECTOR // channels) if stride == 1 else 1
    step, count = stride * block, -(-width // block)
    reach = step - stride + size
    lengths = stride * (height - 1) + size, step * (count + (reach - 1) // step)
    ends = [
        (low, length - low - side, 0)
        for length, side in zip(lengths, x.shape[1:3], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
    x = x.reshape(len(x), lengths[0], -1, step * depth)
    windows = [
        x[:, i::stride, j : j + count, : (reach - j * step) * depth][:, :height]
        for i in range(size)
        for j in range(-(-reach // step))
    ]
    places = [
        jnp.pad(kernel, ((0, 0), (i, step - stride - i), (0, 0), (0, 0)))
        for i in range(0, step, stride)
    ]
    kernel = jnp.stack(places, axis=3).reshape(-1, block * channels)
    y = jnp.concatenate(windows, axis=-1) @ kernel
    return y.reshape(len(x), height, -1, channels)[:, :, :width]


def _phases_at_once(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_on_input` as one product whose channels are the positions modulo the stride.

    Row stride * m + r of the result sees row m + a of `g` by the tap r + padding -
    stride * a, so that the rows of one m share a window of `g`.
    """
    stride, size, padding = geometry.stride, geometry.size, geometry.padding
    first = -((size - 1 - padding) // stride)
    last = (stride - 1 + padding) // stride
    tap = np.arange(stride) + padding - stride * np.arange(first, last + 1)[:, None]
    taps = (tap[..., None] == np.arange(size)).astype(kernel.dtype)
    kernel = jnp.einsum("ark,bsl,klio->aborsi", taps, taps, kernel)
    height, width = (-(-side // stride) for side in geometry.side)
    kernel = kernel.reshape(*kernel.shape[:3], -1)
    y = _product(g, kernel, 1, -first, (height, width))
    y = y.reshape(len(g), height, width, stride, stride, -1).swapaxes(2, 3)
    y = y.reshape(len(g), height * stride, width * stride, -1)
    return y[:, : geometry.side[0], : geometry.side[1]]


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
