"""Convolutions that stay fast when every client has its own kernels.

Under `vmap` over kernels a plain convolution becomes a grouped one, and inside a
`scan` XLA's CPU convolutions run on one thread; both cost 6 to 20 times a dense one.
Patches and one matrix product stay matrix products in either case, so that is what
runs on CPUs. Accelerators keep the native convolution.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mosaic_jax.types import Array

Initializer = Callable[..., Array]


def convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Cross-correlate `x` [B, H, W, I] with `kernel` [k, k, I, O], zero padded."""
    if jax.default_backend() == "cpu":
        return _by_patches(x, kernel, stride, padding)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def convolve_transpose(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Transpose of `convolve`: `x` [B, H, W, I], `kernel` [k, k, O, I].

    Side lengths become (H - 1) * stride - 2 * padding + k, as PyTorch's
    ConvTranspose2d has them.
    """
    size = kernel.shape[0]
    height, width = ((side - 1) * stride - 2 * padding + size for side in x.shape[1:3])
    out = jax.ShapeDtypeStruct((x.shape[0], height, width, kernel.shape[2]), x.dtype)
    transpose = jax.linear_transpose(
        lambda y: convolve(y, kernel, stride, padding), out
    )
    return transpose(x)[0]


def _by_patches(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    size = kernel.shape[0]
    if size == 1 and not padding:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])

    def shifted(row: int, column: int) -> Array:
        rows = slice(row, row + stride * (height - 1) + 1, stride)
        columns = slice(column, column + stride * (width - 1) + 1, stride)
        return x[:, rows, columns]

    patches = [shifted(i, j) for i in range(size) for j in range(size)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Conv(nn.Module):
    """Convolution without bias; `kernel` [k, k, in, out]."""

    features: int
    size: int
    stride: int
    padding: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return convolve(x, kernel, self.stride, self.padding)


class ConvTranspose(nn.Module):
    """Transposed convolution without bias; `kernel` [k, k, out, in]."""

    features: int
    size: int
    stride: int
    padding: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, self.features, x.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape)
        return convolve_transpose(x, kernel, self.stride, self.padding)
