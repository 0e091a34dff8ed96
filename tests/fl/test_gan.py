"""The client GAN's step and the reach of its losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import prng
from mosaic_jax.core.types import ModelState
from mosaic_jax.data import augment
from mosaic_jax.fl import gan
from mosaic_jax.nn import dcgan
from tests import tiny

KEY = prng.root(0)


def make(**changes):
    fields = {
        "generator": dcgan.Generator(16, 1, 2),
        "discriminator": dcgan.Discriminator(16, 2),
        "classifier": tiny.classifier(),
        "tx": optax.sgd(1.0),
        "latent_dim": 5,
        "entropy_weight": 0.0,
        "diversity_weight": 0.0,
        "inversion_weight": 0.0,
        "classifier_train_mode": False,
        "normalised_range": False,
        "ema_decay": 0.5,
        "translate": 0,
    } | changes
    return gan.Gan(**fields)


def step(model_gan, inverts=True):
    classifier = model_gan.classifier
    model = classifier.init(prng.named(KEY, "classifier"), (16, 16, 1))
    state = model_gan.init(prng.named(KEY, "model_gan"), (16, 16, 1))
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)
    run = jax.jit(
        lambda state, inverts: model_gan.step(
            state,
            KEY,
            image,
            jnp.array([True, True, True, False]),
            client_model=model,
            class_share=jnp.full(4, 0.25),
            inverts=inverts,
            statistics=model,
        )
    )
    after, metrics = run(state, jnp.array(inverts))
    return state, after, metrics


def difference(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_both_players_and_the_average_move():
    state, after, metrics = step(make())
    assert difference(state.generator.params, after.generator.params) > 0
    assert difference(state.discriminator.params, after.discriminator.params) > 0
    middle = jax.tree.map(lambda a, b: (a + b) / 2, state.generator, after.generator)
    assert difference(middle, after.average) < 1e-6
    assert set(metrics) == {"discriminator_loss", "generator_loss"}


@pytest.mark.parametrize("term", ["entropy", "diversity", "inversion"])
def test_each_term_reaches_the_generator_alone(term):
    _, plain, _ = step(make())
    _, shaped, metrics = step(make(**{f"{term}_weight": 1.0}))
    assert np.isfinite(metrics[term])
    assert difference(plain.generator.params, shaped.generator.params) > 0
    assert difference(plain.discriminator.params, shaped.discriminator.params) == 0


def test_inversion_is_off_for_large_clients():
    _, plain, _ = step(make())
    _, shaped, metrics = step(make(inversion_weight=1.0), inverts=False)
    assert metrics["inversion"] == 0
    assert difference(plain.generator.params, shaped.generator.params) < 1e-7


def test_masked_images_do_not_reach_the_discriminator():
    model_gan = make()
    state = model_gan.init(prng.named(KEY, "model_gan"), (16, 16, 1))
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)
    model = model_gan.classifier.init(prng.named(KEY, "classifier"), (16, 16, 1))
    mask = jnp.array([True, True, True, False])

    @jax.jit
    def run(image):
        return model_gan.step(
            state,
            KEY,
            image,
            mask,
            client_model=model,
            class_share=jnp.full(4, 0.25),
            inverts=jnp.array(False),
            statistics=model,
        )[0]

    other = run(image.at[3].set(0.9))
    assert difference(run(image).discriminator, other.discriminator) < 1e-6


def test_ranges_are_inverse():
    model_gan = make(normalised_range=True)
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(
        model_gan.decode(model_gan.encode(image)), image, atol=1e-6
    )
    assert dataclasses.replace(model_gan, normalised_range=False).encode(image) is image


class Mirror:
    """In place of a discriminator: its logits are what it is shown."""

    def apply(self, variables, image, **_):
        return image, {"batch_stats": {}}


@pytest.mark.parametrize("normalised", [False, True])
def test_what_enters_a_shifted_image_is_black_in_its_range(normalised):
    model_gan = make(discriminator=Mirror(), translate=2, normalised_range=normalised)
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)
    key = prng.named(KEY, "shift")
    again = jax.random.clone(key)
    shown, _ = model_gan._judge(ModelState({}, {}), key, model_gan.encode(image))
    shifted = augment.translate(again, image, pixels=2)
    assert (shifted[:, 0, 0] == -1).any()
    np.testing.assert_allclose(shown, model_gan.encode(shifted), atol=1e-6)
