"""One local step of all clients: ways to lower it, and a PyTorch loop, side by side.

    python -m benchmarks.client_step --width 16 --clients 10 --batch 64
    python -m benchmarks.client_step --network gan --width 16

Prints milliseconds per client-step (median, low to high over the repeats) and the ratio
of each rival to `mosaic_jax`; writes benchmarks/results/client_step_NETWORK_WIDTH.json.
The rivals:

    mosaic_jax       what this library runs on this backend, on one device
    mosaic_jax, N devices   the same, clients dealt to a device for each core
    vmap, LOWERING   all clients in one `vmap`, by each lowering of the convolution
    naive vmap       the same with plain lax convolutions: grouped ones
    naive loop       a Python loop over jitted steps of one client, plain convolutions
    PyTorch loop     a Python loop over clients in PyTorch, in a process of its own;
                     left out without its environment (benchmarks.environments)
    PyTorch loop, channels last   the same in its faster memory layout
"""

import argparse
import functools
import os
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import environments, timing, worker
from mosaic_jax.cli import launch
from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, Batch, Tree
from mosaic_jax.fl import gan, parallel, training
from mosaic_jax.nn import conv, dcgan, resnet
from mosaic_jax.nn.classifier import Classifier

SIDE, DEPTH, CLASSES, LATENT = 32, 3, 10, 100
LEARNING_RATE = 0.01
# (state, image, label, key) -> state
Step = Callable[[Tree, Array, Array, Array], Tree]


def resnet_step(width: int, lowering: str) -> tuple[Tree, Step]:
    """State and SGD step of one client's ResNet-18."""
    module = resnet.ResNet(CLASSES, width=width, lowering=lowering)
    classifier = Classifier(module, (0.5,) * DEPTH, (0.25,) * DEPTH)
    tx = training.sgd(LEARNING_RATE, 1e-4)
    model = jax.jit(classifier.init, static_argnums=1)(
        jax.random.key(0), (SIDE, SIDE, DEPTH)
    )

    def step(model: Tree, image: Array, label: Array, key: Array) -> Tree:
        del key
        batch = Batch(image, label, jnp.ones(len(label), bool))
        return training.sgd_step(classifier, tx, model, tx.init(model.params), batch)[0]

    return model, step


def gan_step(width: int, lowering: str) -> tuple[Tree, Step]:
    """State and step (both players) of one client's GAN, without classifier losses."""
    model_gan = gan.Gan(
        generator=dcgan.Generator(SIDE, DEPTH, width, lowering=lowering),
        discriminator=dcgan.Discriminator(SIDE, width, lowering=lowering),
        classifier=None,
        tx=optax.adam(2e-4, b1=0.5, b2=0.999),
        latent_dim=LATENT,
    )
    shape = (SIDE, SIDE, DEPTH)
    state = jax.jit(model_gan.init, static_argnums=1)(jax.random.key(0), shape)

    def step(state: Tree, image: Array, label: Array, key: Array) -> Tree:
        mask = jnp.ones(len(label), bool)
        unused = {"client_model": None, "class_share": None, "statistics": None}
        return model_gan.step(state, key, 0, image, mask, inverts=None, **unused)[0]

    return state, step


NETWORKS = {"resnet18": resnet_step, "gan": gan_step}


def plain(x: Array, kernel: Array, stride: int, padding: int, _: str) -> Array:
    """What everybody writes first."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_transpose(
    x: Array, kernel: Array, stride: int, padding: int, _: str
) -> Array:
    """Likewise."""
    return jax.lax.conv_transpose(
        x,
        kernel,
        (stride, stride),
        [(len(kernel) - 1 - padding,) * 2] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )


def jax_rivals(network: str, width: int, data: tuple, only: set[str]) -> dict:
    """Name to a call that runs one step of all clients.

    Args:
      network: of `NETWORKS`.
      width: of it.
      data: images [C, B, H, W, D] in [-1, 1], labels [C, B] and keys [C].
      only: names of rivals; empty: all.
    """
    clients = len(data[0])
    axis = parallel.build(np.ones(clients, int), num_devices=1)
    batched = {
        "mosaic_jax": ("auto", axis.map),
        **{
            f"vmap, {lowering}": (lowering, lambda step, *args: jax.vmap(step)(*args))
            for lowering in ("dense", "patches")
        },
        "naive vmap": (None, lambda step, *args: jax.vmap(step)(*args)),
    }
    rivals = {}
    for name, (lowering, run) in batched.items():
        state, step = NETWORKS[network](width, lowering or "auto")
        program = jax.jit(functools.partial(run, step), donate_argnums=0)
        rivals[name] = _keeping(
            program, trees.broadcast(state, clients), data, lowering
        )
    state, step = NETWORKS[network](width, "auto")
    alone = jax.jit(step, donate_argnums=0)

    def loop(states: list[Tree], *data: Array) -> list[Tree]:
        return [
            alone(state, *(array[i] for array in data))
            for i, state in enumerate(states)
        ]

    cores = os.cpu_count() or 1
    many = parallel.build(np.ones(clients, int), num_devices=cores)
    rivals[f"mosaic_jax, {cores} devices"] = _keeping(
        jax.jit(functools.partial(many.map, step), donate_argnums=0),
        many.replicate(trees.broadcast(state, clients)),
        many.replicate(data),
        "auto",
    )
    copies = [jax.tree.map(jnp.copy, state) for _ in range(clients)]
    rivals["naive loop"] = _keeping(loop, copies, data, None)
    return {name: run for name, run in rivals.items() if not only or name in only}


def _keeping(program, state: Tree, data: tuple, lowering: str | None):
    """A call that runs `program` on the state of the call before."""
    state = jax.tree.map(jnp.copy, state)

    def run() -> None:
        nonlocal state
        if lowering is None:
            with (
                mock.patch.object(conv, "convolve", plain),
                mock.patch.object(conv, "convolve_transpose", plain_transpose),
            ):
                state = program(state, *data)
        else:
            state = program(state, *data)
        jax.block_until_ready(state)

    return run


def torch_rivals(network: str, width: int, data: tuple) -> dict:
    """The PyTorch loops; none without their environment.

    Args:
      network: of `NETWORKS`.
      width: of it.
      data: as of `jax_rivals`.
    """
    if not environments.is_ready("torch"):
        return {}
    loops = worker.Worker("torch", "benchmarks.torch_step")
    arrays = {"image": np.asarray(data[0]), "label": np.asarray(data[1])}
    loops.call(
        "prepare", arrays, network=network, width=width, learning_rate=LEARNING_RATE
    )
    return {
        name: functools.partial(loops.call, "step", name=name)
        for name in ("PyTorch loop", "PyTorch loop, channels last")
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="names of rivals, by ;")
    args = parser.parse_args()
    launch.prepare()
    parallel.make_devices(os.cpu_count() or 1)
    np_rng = np.random.RandomState(0)
    shape = (args.clients, args.batch)
    data = (
        jnp.asarray(np_rng.uniform(-1, 1, (*shape, SIDE, SIDE, DEPTH)), jnp.float32),
        jnp.asarray(np_rng.randint(0, CLASSES, shape)),
        jax.random.split(jax.random.key(1), args.clients),
    )
    only = set(filter(None, args.only.split(";")))
    rivals = jax_rivals(args.network, args.width, data, only)
    rivals |= torch_rivals(args.network, args.width, data)
    seconds = timing.take_turns(rivals, args.repeats)
    result = {
        name: timing.spread([1e3 * s / args.clients for s in values])
        for name, values in seconds.items()
    }
    ours = result["mosaic_jax"]["median"]
    rows = [
        (
            name,
            f"{found['median']:.1f} ({found['low']:.1f} to {found['high']:.1f})",
            f"{ours / found['median']:.2f}",
        )
        for name, found in result.items()
    ]
    print(timing.table(["", "ms per client-step", "mosaic_jax / this"], rows))
    timing.save(f"client_step_{args.network}_{args.width}", result)


if __name__ == "__main__":
    main()
