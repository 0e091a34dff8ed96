"""GANs of clients that can afford a part of the network only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.fl import gan
from mosaic_jax.nn import dcgan, submodel
from tests import tiny

KEY = prng.root(0)


def close(a, b, rtol):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b
    )


@pytest.mark.slow
def test_a_generator_of_half_the_width_among_zeros_trains_as_one():
    fields = {
        "classifier": tiny.classifier(),
        "tx": optax.adam(1e-3, b1=0.5),
        "latent_dim": 5,
        "entropy_weight": 0.1,
        "diversity_weight": 1.0,
        "inversion_weight": 0.1,
        "ema_decay": 0.5,
    }
    wide, narrow = (
        gan.Gan(
            generator=dcgan.Generator(16, 1, width),
            discriminator=dcgan.Discriminator(16, width),
            **fields,
        )
        for width in (4, 2)
    )
    state = trees.broadcast(wide.init(prng.named(KEY, "wide"), (16, 16, 1)), 1)
    state = trees.take(gan.narrowed(wide, state, [0.5]), 0)

    def first_half(module, model):
        channels = {
            space: jnp.arange(width // 2) for space, width in module.widths.items()
        }
        return submodel.cut(model, module.spaces, channels)

    generator = first_half(wide.generator, state.generator)
    discriminator = first_half(wide.discriminator, state.discriminator)
    small = narrow.init(prng.named(KEY, "narrow"), (16, 16, 1)).replace(
        generator=generator, discriminator=discriminator, average=generator
    )
    classifier = wide.classifier.init(prng.named(KEY, "classifier"), (16, 16, 1))
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)

    def train(each, state):
        @jax.jit
        def step(state, number):
            return each.step(
                state,
                prng.at(KEY, number),
                number,
                image,
                jnp.ones(4, bool),
                client_model=classifier,
                class_share=jnp.full(4, 0.25),
                inverts=jnp.array(True),
                statistics=classifier,
            )[0]

        for number in range(3):
            state = step(state, number)
        return state

    state, small = train(wide, state), train(narrow, small)
    close(first_half(wide.generator, state.generator), small.generator, 1e-4)
    close(
        first_half(wide.discriminator, state.discriminator), small.discriminator, 1e-4
    )
    count = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(state.generator))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(small.generator))
