"""The client GAN's step and the reach of its losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import flops, prng
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
        "ema_decay": 0.5,
    } | changes
    return gan.Gan(**fields)


def step(model_gan, inverts=True, number=0):
    classifier = model_gan.classifier
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(prng.named(KEY, "classifier"), (16, 16, 1))
    init = jax.jit(model_gan.init, static_argnums=1)
    state = init(prng.named(KEY, "model_gan"), (16, 16, 1))
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)
    run = jax.jit(
        lambda state, inverts: model_gan.step(
            state,
            KEY,
            jnp.array(number),
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
    assert set(metrics) == {"discriminator_loss", "generator_loss"}
    assert difference(state.generator.params, after.generator.params) > 0
    assert difference(state.discriminator.params, after.discriminator.params) > 0
    # What a mean starts at does not count; the second entry has weight 1 of 1.5.
    assert difference(after.generator, after.average) < 1e-6
    state, after, _ = step(make(), number=1)
    mean = jax.tree.map(lambda a, b: (a + 2 * b) / 3, state.generator, after.generator)
    assert difference(mean, after.average) < 1e-6


@pytest.mark.parametrize("term", ["entropy", "diversity", "inversion"])
@pytest.mark.slow
def test_each_term_reaches_the_generator_alone(term):
    _, plain, _ = step(make())
    _, shaped, metrics = step(make(**{f"{term}_weight": 1.0}))
    assert np.isfinite(metrics[term])
    assert difference(plain.generator.params, shaped.generator.params) > 1e-4
    assert difference(plain.discriminator.params, shaped.discriminator.params) < 1e-6


def test_inversion_is_off_for_large_clients():
    _, plain, _ = step(make())
    _, shaped, metrics = step(make(inversion_weight=1.0), inverts=False)
    assert metrics["inversion"] == 0
    assert difference(plain.generator.params, shaped.generator.params) < 1e-5


JUDGED = {
    "discriminator": None,
    "entropy_weight": 0.5,
    "diversity_weight": 2.0,
    "inversion_weight": 0.25,
}


def test_a_step_judged_by_the_classifier_by_hand():
    """SGD at rate 1 on the losses of the classifier alone, from their definitions."""
    model_gan = make(**JUDGED)
    classifier = model_gan.classifier
    model = jax.jit(classifier.init, static_argnums=1)(
        prng.named(KEY, "classifier"), (16, 16, 1)
    )
    state, after, metrics = step(model_gan)
    z = jax.random.normal(prng.named(KEY, "z"), (4, 5))

    def losses_of(params):
        variables = {"params": params, "batch_stats": state.generator.batch_stats}
        image, _ = model_gan.generator.apply(
            variables, z, train=True, mutable=["batch_stats"]
        )
        logits, moments = classifier.logits_and_moments(model, image)
        p = jnp.exp(logits) / jnp.exp(logits).sum(1, keepdims=True)
        mean = p.mean(0)
        apart = jax.tree.map(
            lambda a, b: jnp.sqrt(((a - b) ** 2).sum()), moments, model.batch_stats
        )
        return {
            "entropy": -(p * jnp.log(p)).sum(1).mean(),
            # The target of all four classes is 1/4: K q = 1.
            "diversity": (mean * jnp.log(mean)).sum(),
            "inversion": sum(jax.tree.leaves(apart)),
        }

    @jax.jit
    def expected(params):
        def total(params):
            found = losses_of(params)
            weighted = 0.5 * found["entropy"] + 2 * found["diversity"]
            return weighted + 0.25 * found["inversion"], found

        gradient, found = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(jnp.subtract, params, gradient), found

    params, found = expected(state.generator.params)
    assert difference(state.generator.params, params) > 1e-4
    tiny.close(after.generator.params, params, 1e-4)
    tiny.close(metrics, found, 1e-4)


def test_no_discriminator_has_no_state_and_sees_no_images():
    model_gan = make(**JUDGED)
    state, after, _ = step(model_gan)
    for one in (state, after):
        assert one.discriminator == one.discriminator_opt == ()
    with_one, *_ = step(make())
    # The networks of a kind start alike, whatever judges them.
    assert difference(state.generator, with_one.generator) == 0

    @jax.jit
    def run(image):
        model = model_gan.classifier.init(prng.named(KEY, "classifier"), (16, 16, 1))
        return model_gan.step(
            state,
            KEY,
            jnp.array(0),
            image,
            jnp.ones(4, bool),
            client_model=model,
            class_share=jnp.full(4, 0.25),
            inverts=jnp.array(True),
            statistics=model,
        )

    black, white = (run(jnp.full((4, 16, 16, 1), value)) for value in (-1.0, 1.0))
    assert difference(black, white) == 0


def test_operations_without_a_discriminator():
    """Generating and its gradient, and two ways through the classifier; no more."""
    model_gan, shape = make(**JUDGED), (16, 16, 1)
    generator, judging = model_gan.flops(shape)
    assert judging == 0 and generator == make().flops(shape)[0]
    each = flops.THROUGH * model_gan.classifier.flops(shape)
    for inverts, times in ((False, 1), (True, 2)):
        found = model_gan.step_flops(shape, inverts=inverts)
        assert found == flops.TRAINED * generator + times * each


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
            jnp.array(0),
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
