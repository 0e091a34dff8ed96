"""Forms of a convolution's three linear maps, layer by layer, inside a loop.

    python -m benchmarks.lowerings --width 16
    python -m benchmarks.lowerings --width 64 --repeats 3
    python -m benchmarks.lowerings --width 4 --batch 16

The table behind the choices in mosaic_jax/nn/conv.py. For every layer shape of a
CIFAR ResNet-18 and of a 32-pixel DCGAN discriminator it times ways to compute the
forward pass, the gradient of the input and that of the kernel, each repeated within one
`fori_loop`, as local training runs them. Prints milliseconds (lowest of the repeats)
and writes benchmarks/results/lowerings_WIDTH.json.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import timing
from mosaic_jax.cli import launch
from mosaic_jax.core import programs
from mosaic_jax.core.types import Array
from mosaic_jax.nn import conv

LOOPS = 4
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# A linear map of the convolution: takes its geometry and two of the input x, the kernel
# and the gradient g of the output; returns an array of the shape of the third.
Map = Callable[[conv.Geometry, Array, Array], Array]


def layers(width: int) -> dict[str, tuple[int, int, int, int, int, int]]:
    """Name to side, channels in and out, kernel size, stride, padding."""
    w = width
    return {
        "resnet stem": (32, 3, w, 3, 1, 1),
        "resnet 32": (32, w, w, 3, 1, 1),
        "resnet 32 to 16": (32, w, 2 * w, 3, 2, 1),
        "resnet 16": (16, 2 * w, 2 * w, 3, 1, 1),
        "resnet 8": (8, 4 * w, 4 * w, 3, 1, 1),
        "resnet 4": (4, 8 * w, 8 * w, 3, 1, 1),
        "dcgan 16 to 8": (16, w, 2 * w, 4, 2, 1),
        "dcgan 8 to 4": (8, 2 * w, 4 * w, 4, 2, 1),
        "dcgan 4 to 2": (4, 4 * w, 8 * w, 4, 2, 1),
    }


def native(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """lax.conv_general_dilated."""
    strides = (geometry.stride,) * 2
    pads = [(geometry.padding,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=DIMENSIONS
    )


def by_patches(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """Patches and one matrix product."""
    return conv._patches(geometry, x) @ kernel.reshape(-1, kernel.shape[-1])


def one_product(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """Windows of several pixels, and a kernel placed at each of them."""
    return conv._product(x, kernel, geometry.stride, geometry.padding, geometry.out)


def by_shifts(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """A matrix product for each tap of the kernel, summed."""
    shifts = jnp.split(conv._patches(geometry, x), geometry.size**2, axis=-1)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    return sum(shift @ tap for shift, tap in zip(shifts, taps, strict=True))


def batch_last(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """Patches in the layout channels, height, width, batch (times the transposes)."""
    patches = conv._patches(geometry, x).transpose(3, 1, 2, 0)
    y = jnp.tensordot(kernel.reshape(-1, kernel.shape[-1]), patches, ((0,), (0,)))
    return y.transpose(3, 1, 2, 0)


def in_bfloat16(geometry: conv.Geometry, x: Array, kernel: Array) -> Array:
    """Native, in bfloat16."""
    half = jnp.bfloat16
    return native(geometry, x.astype(half), kernel.astype(half)).astype(x.dtype)


def input_automatic(geometry: conv.Geometry, g: Array, kernel: Array) -> Array:
    """What differentiating the native convolution gives."""
    shape = (len(g), *geometry.side, kernel.shape[2])
    x = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda x: native(geometry, x, kernel), x)(g)[0]


def input_patches(geometry: conv.Geometry, g: Array, kernel: Array) -> Array:
    """The transpose of patches and product: scattered sums."""
    shape = (len(g), *geometry.side, kernel.shape[2])
    x = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda x: by_patches(geometry, x, kernel), x)(g)[0]


def input_phases(geometry: conv.Geometry, g: Array, kernel: Array) -> Array:
    """A convolution for each position modulo the stride."""
    return conv._by_phases(geometry, g, kernel.swapaxes(2, 3))


def kernel_product(geometry: conv.Geometry, x: Array, g: Array) -> Array:
    """The transpose of `one_product`."""
    shape = (geometry.size, geometry.size, x.shape[-1], g.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda k: one_product(geometry, x, k), kernel)(g)[0]


def kernel_automatic(geometry: conv.Geometry, x: Array, g: Array) -> Array:
    """What differentiating the native convolution gives."""
    shape = (geometry.size, geometry.size, x.shape[-1], g.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, g.dtype)
    return jax.linear_transpose(lambda k: native(geometry, x, k), kernel)(g)[0]


def kernel_convolution(geometry: conv.Geometry, x: Array, g: Array) -> Array:
    """A convolution whose batch are the channels, operands laid out for it."""
    pads = [
        (geometry.padding, geometry.size - 1 + (out - 1) * geometry.stride + 1 - n)
        for out, n in zip(geometry.out, geometry.side, strict=True)
    ]
    pads = [(low, high - low) for low, high in pads]
    y = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        pads,
        rhs_dilation=(geometry.stride,) * 2,
        dimension_numbers=DIMENSIONS,
    )
    return y.transpose(1, 2, 0, 3)


def kernel_patches(geometry: conv.Geometry, x: Array, g: Array) -> Array:
    """All patches at once, on the left of the product: XLA transposes them."""
    samples = ((0, 1, 2), (0, 1, 2))
    y = lax.dot_general(conv._patches(geometry, x), g, (samples, ((), ())))
    return y.reshape(geometry.size, geometry.size, x.shape[-1], -1)


FORMS: dict[str, dict[str, Map]] = {
    "forward": {
        "chosen": conv._forward,
        "native": native,
        "patches": by_patches,
        "one product": one_product,
        "shifted products": by_shifts,
        "batch last": batch_last,
        "native, bfloat16": in_bfloat16,
    },
    "on input": {
        "chosen": conv._on_input,
        "automatic": input_automatic,
        "phases": input_phases,
        "patches": input_patches,
        "one product": conv._phases_at_once,
    },
    "on kernel": {
        "chosen": conv._on_kernel,
        "automatic": kernel_automatic,
        "a convolution": kernel_convolution,
        "patches, whole batch": kernel_patches,
        "one product": kernel_product,
    },
}


def in_a_loop(form: Map, geometry: conv.Geometry, a: Array, b: Array):
    """A call that runs `form` a few times, each on what the one before changed.

    Args:
      form: of `FORMS`.
      geometry: of the convolution.
      a: first array that `form` takes, which changes.
      b: the second.
    """

    @jax.jit
    def run(a: Array, b: Array) -> Array:
        def body(_: int, a: Array) -> Array:
            # Too small to change anything, too large to be optimised away.
            return a + jnp.sum(form(geometry, a, b)) * 1e-20

        return lax.fori_loop(0, LOOPS, body, a)

    return lambda: jax.block_until_ready(run(a, b))


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    launch.prepare()
    np_rng = np.random.RandomState(0)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for layer, (side, into, out, size, stride, padding) in layers(args.width).items():
        form = "auto", programs.platform()
        geometry = conv.Geometry((side, side), size, stride, padding, *form)
        arrays = {
            "x": np_rng.randn(args.batch, side, side, into),
            "kernel": np_rng.randn(size, size, into, out),
            "g": np_rng.randn(args.batch, *geometry.out, out),
        }
        arrays = {name: jnp.asarray(v, jnp.float32) for name, v in arrays.items()}
        pairs = {"forward": "x kernel", "on input": "g kernel", "on kernel": "x g"}
        for which, forms in FORMS.items():
            a, b = (arrays[name] for name in pairs[which].split())
            rivals = {
                name: in_a_loop(form, geometry, a, b) for name, form in forms.items()
            }
            seconds = timing.take_turns(rivals, args.repeats)
            result.setdefault(which, {})[layer] = {
                name: 1e3 * min(values) / LOOPS for name, values in seconds.items()
            }
    for which, by_layer in result.items():
        names = list(FORMS[which])
        rows = [
            (layer, *(f"{found[name]:.2f}" for name in names))
            for layer, found in by_layer.items()
        ]
        print(f"\n{which}, ms\n")
        print(timing.table(["layer", *names], rows), flush=True)
    timing.save(f"lowerings_{args.width}", result)


if __name__ == "__main__":
    main()
