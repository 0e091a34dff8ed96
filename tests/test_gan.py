"""The client GAN's step, its losses' reach, and collapse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import cifar10_mosaic
from mosaic_jax import experiment, gan, prng
from mosaic_jax.data import augment
from mosaic_jax.models import dcgan
from mosaic_jax.stages import generators
from mosaic_jax.types import ModelState
from tests import tiny

KEY = prng.root(0)
SIZE = np.array([64, 65, 3])


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


def test_constant_output_is_found_collapsed():
    model_gan = make()
    generator = model_gan.init(prng.named(KEY, "model_gan"), (16, 16, 1)).generator
    z = jax.random.normal(prng.named(KEY, "z"), (64, model_gan.latent_dim))
    spread = jax.jit(lambda g: generators.deviation(model_gan, g, z))
    constant = jax.tree.map(jnp.zeros_like, generator)
    assert spread(constant) == 0
    assert spread(generator) > 0


def test_class_shares():
    count = jnp.array([[30, 10, 0, 0]])
    share = generators.class_shares(count, "labels")[0]
    np.testing.assert_allclose(share, [0.75, 0.25, 0, 0], atol=2e-3)
    assert share.min() > 0
    np.testing.assert_allclose(generators.class_shares(count, "uniform"), 0.25)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epochs": 2}, [2, 4, 2]),
        ({"epochs": 2, "min_steps": 3}, [3, 4, 3]),
        ({"epochs": 2, "max_steps": 3}, [2, 3, 2]),
        ({"epochs": 2, "min_steps": 3, "max_steps": 3}, [3, 3, 3]),
        # The bounds are on what epochs come to.
        ({"steps": 7, "min_steps": 9}, [7, 7, 7]),
    ],
)
def test_steps_of_unequal_clients(fields, expected):
    whole = {"epochs": 0, "steps": 0, "min_steps": 0, "max_steps": 0, "batch_size": 64}
    changes = {f"generators__{name}": value for name, value in (whole | fields).items()}
    steps = generators.num_steps(tiny.study(**changes).generators, SIZE)
    assert steps.tolist() == expected


def test_the_bound_is_what_a_study_runs_and_promises(tmp_path):
    def study(min_steps):
        fields = {"epochs": 1, "steps": 0, "min_steps": min_steps}
        changes = {f"generators__{name}": value for name, value in fields.items()}
        return experiment.Experiment(tiny.study(**changes), tmp_path)

    few, many = study(0), study(1000)
    sizes = few.data.clients.client.size
    free = generators.num_steps(few.settings.generators, sizes).sum()
    assert free < 1000
    ratio = many.flops["generators"] / few.flops["generators"]
    assert ratio == pytest.approx(1000 * len(sizes) / free)


def test_published_studies_count_epochs_alone():
    assert cifar10_mosaic.get_config().generators.min_steps == 2000
    published = cifar10_mosaic.get_config("published").generators
    assert (published.min_steps, published.max_steps) == (0, 0)
