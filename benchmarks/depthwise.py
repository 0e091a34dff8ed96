"""Forms of a depthwise convolution's three linear maps, for clients with own kernels.

    python -m benchmarks.depthwise
    python -m benchmarks.depthwise --clients 1

The table behind the choice in mosaic_jax/nn/depthwise.py. For layer shapes of a
MobileNetV2 on 32-pixel images it times sums of shifted products of one client after
another ("one by one") and of all at once, one convolution whose groups are channels
of all clients ("grouped"), and what `vmap` makes of XLA's own depthwise convolution and
its derivatives ("default"), each in a `fori_loop`. Prints milliseconds of one client
(lowest of the repeats) and writes benchmarks/results/depthwise_CLIENTS.json.
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
from mosaic_jax.nn import depthwise
from mosaic_jax.nn.conv import Geometry

LOOPS = 2
# Channels, side and stride of layers of a MobileNetV2 of width 32 (half of the whole).
LAYERS = {"16, 96 channels": (16, 96, 1), "16 to 8": (16, 96, 2), "8": (8, 192, 1)}
# Names of forms to lowerings.
FORMS = {"one by one": "dense", "all at once": "patches", "grouped": "grouped"}
MAPS = {
    "forward": (depthwise.forward, "x", "kernel"),
    "on input": (depthwise.on_input, "g", "kernel"),
    "on kernel": (depthwise.on_kernel, "x", "g"),
}


def default(which: str, geometry: Geometry) -> Callable[[Array, Array], Array]:
    """One of the linear maps of XLA's own convolution, as JAX derives it."""

    def native(x: Array, kernel: Array) -> Array:
        return depthwise._native(geometry, x, kernel)

    def on_input(g: Array, kernel: Array) -> Array:
        x = jax.ShapeDtypeStruct((len(g), *geometry.side, g.shape[-1]), g.dtype)
        return jax.linear_transpose(lambda x: native(x, kernel), x)(g)[0]

    def on_kernel(x: Array, g: Array) -> Array:
        shape = (geometry.size, geometry.size, 1, g.shape[-1])
        kernel = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda k: native(x, k), kernel)(g)[0]

    return {"forward": native, "on input": on_input, "on kernel": on_kernel}[which]


def in_a_loop(form: Callable[[Array, Array], Array], a: Array, b: Array):
    """A call that runs `form` a few times, each on what the one before changed."""

    @jax.jit
    def run(a: Array, b: Array) -> Array:
        def body(_: int, a: Array) -> Array:
            # Too small to change anything, too large to be optimised away.
            return a + jnp.sum(form(a, b)) * 1e-20

        return lax.fori_loop(0, LOOPS, body, a)

    return lambda: jax.block_until_ready(run(a, b))


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    launch.prepare()
    np_rng, rows, result = np.random.RandomState(0), [], {}
    for layer, (side, channels, stride) in LAYERS.items():
        geometries = {
            lowering: Geometry(
                (side, side), 3, stride, 1, lowering, programs.platform()
            )
            for lowering in FORMS.values()
        }
        out = geometries["dense"].out
        shapes = {
            "x": (args.batch, side, side, channels),
            "kernel": (3, 3, 1, channels),
            "g": (args.batch, *out, channels),
        }
        arrays = {
            name: jnp.asarray(np_rng.randn(args.clients, *shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for which, (function, first, second) in MAPS.items():
            forms = {
                name: depthwise._op(function, geometries[lowering])
                for name, lowering in FORMS.items()
            } | {"default": default(which, geometries["dense"])}
            a, b = arrays[first], arrays[second]
            rivals = {
                name: in_a_loop(jax.vmap(form), a, b) for name, form in forms.items()
            }
            seconds = timing.take_turns(rivals, args.repeats)
            each = LOOPS * args.clients
            found = {
                name: 1e3 * min(each_of) / each for name, each_of in seconds.items()
            }
            result.setdefault(which, {})[layer] = found
            rows.append((layer, which, *(f"{ms:.2f}" for ms in found.values())))
    print(timing.table(["layer", "map", *found], rows), flush=True)
    timing.save(f"depthwise_{args.clients}", result)


if __name__ == "__main__":
    main()
