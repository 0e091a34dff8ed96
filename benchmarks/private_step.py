"""A private step of a client's GAN, and of its classifier, against the plain one.

    python -m benchmarks.private_step --width 16 --side 16 --batch 32
    python -m benchmarks.private_step --width 64

One client. The plain steps see `--batch` images, the private ones Poisson batches of as
many on average, of a client with ten times as many: sampling, clipping and noise are
included. The plain GAN's discriminator has batch-norm, as in studies that are not
private; the classifier is a CNN with group-norm in both. Rivals take turns within one
run. Prints milliseconds per step (median, low to high over the repeats) and the ratio
to the plain step; writes benchmarks/results/private_step_SIDE_WIDTH.json.
"""

import argparse
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from mosaic_jax.core import prng
from mosaic_jax.core.types import Array, Client, LabelledImages, Tree
from mosaic_jax.fl import accounting, gan, training
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn import cnn, dcgan
from mosaic_jax.nn.classifier import Classifier

CLASSES, LATENT, STEPS = 10, 100, 10
# (state, data, key, number) -> state
Step = Callable[[Tree, Tree, Array, Array], Tree]


def steps(side: int, width: int, batch: int) -> tuple[dict[str, Tree], dict[str, Step]]:
    """Initial states by network, and a step of each rival, its network's name first."""
    shape, depth = (side, side, 1 if side == 16 else 3), 1 if side == 16 else 3
    rows = accounting.rows_for(10 * batch, batch, math.log(1e-15))
    mechanism = Mechanism(1.0, 1.0, ((batch, rows),))
    network = cnn.CNN(CLASSES, width=width, norm="group")
    classifier = Classifier(network, (0.5,) * depth, (0.25,) * depth)
    tx = training.sgd(0.05, 1e-4)
    plain = gan.Gan(
        generator=dcgan.Generator(side, depth, width),
        discriminator=dcgan.Discriminator(side, width),
        classifier=classifier,
        tx=optax.adam(2e-4, b1=0.5, b2=0.999),
        latent_dim=LATENT,
    )
    hidden = plain.private(mechanism, batch)

    def batch_of(data: Tree, key: Array, number: Array, kind: Mechanism | None):
        client, images = data
        return training.client_batches(
            client,
            images,
            number,
            1,
            key=key,
            batch_size=batch,
            augmentation="none",
            mechanism=kind,
        )(jnp.int32(0))

    def gan_step(one: gan.Gan, state: Tree, data: Tree, key: Array, number: Array):
        found = batch_of(data, key, number, one.mechanism)
        return one.step(
            state,
            prng.at(prng.named(key, "step"), number),
            number,
            found.image,
            found.mask,
            client_model=None,
            class_share=None,
            inverts=None,
            statistics=None,
            client=data[0],
        )[0]

    def plain_sgd(model: Tree, data: Tree, key: Array, number: Array):
        found = batch_of(data, key, number, None)
        opt_state = tx.init(model.params)
        return training.sgd_step(classifier, tx, model, opt_state, found)[0]

    def private_sgd(model: Tree, data: Tree, key: Array, number: Array):
        return training.private_step(
            classifier,
            tx,
            model,
            tx.init(model.params),
            batch_of(data, key, number, mechanism),
            mechanism=mechanism,
            client=data[0],
            batch_size=batch,
            key=prng.at(prng.named(key, "privacy"), number),
        )[0]

    key = prng.root(0)
    states = {
        "GAN": jax.jit(plain.init, static_argnums=1)(key, shape),
        "private GAN": jax.jit(hidden.init, static_argnums=1)(key, shape),
        "classifier": jax.jit(classifier.init, static_argnums=1)(key, shape),
    }
    states["private classifier"] = states["classifier"]
    return states, {
        "GAN": functools.partial(gan_step, plain),
        "private GAN": functools.partial(gan_step, hidden),
        "classifier": plain_sgd,
        "private classifier": private_sgd,
    }


def dataset(side: int, count: int) -> tuple[Client, LabelledImages]:
    """One client with `count` random images."""
    np_rng = np.random.default_rng(0)
    shape = (count, side, side, 1 if side == 16 else 3)
    images = LabelledImages(
        jnp.asarray(np_rng.integers(0, 256, shape), jnp.uint8),
        jnp.asarray(np_rng.integers(0, CLASSES, count), jnp.int32),
    )
    client = Client(
        number=jnp.int32(0),
        index=jnp.arange(count, dtype=jnp.int32),
        size=jnp.int32(count),
        label_count=jnp.full(CLASSES, count // CLASSES, jnp.int32),
        noise=jnp.float32(1.0),
    )
    return client, images


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=32, choices=dcgan.IMAGE_SIZES)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    states, rivals = steps(args.side, args.width, args.batch)
    data, key = dataset(args.side, 10 * args.batch), prng.named(prng.root(0), "run")

    def several(step: Step, state: Tree, data: Tree, key: Array) -> Tree:
        def body(number: Array, state: Tree) -> Tree:
            return step(state, data, key, number)

        return jax.lax.fori_loop(0, STEPS, body, state)

    def call(name: str) -> Callable[[], Tree]:
        run = jax.jit(functools.partial(several, rivals[name]))
        return lambda: jax.block_until_ready(run(states[name], data, key))

    seconds = timing.take_turns({name: call(name) for name in rivals}, args.repeats)
    found = {
        name: timing.spread([1000 * value / STEPS for value in values])
        for name, values in seconds.items()
    }
    rows = [
        (
            name,
            f"{one['median']:.1f} ({one['low']:.1f} to {one['high']:.1f})",
            f"{one['median'] / found[name.removeprefix('private ')]['median']:.2f}",
        )
        for name, one in found.items()
    ]
    print(timing.table(("step", "ms", "ratio"), rows))
    timing.save(f"private_step_{args.side}_{args.width}", found)


if __name__ == "__main__":
    main()
