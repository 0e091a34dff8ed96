"""Generators that the server moves towards the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Experts, Teacher
from mosaic_jax.fl import gan
from mosaic_jax.nn import dcgan
from mosaic_jax.server import mosaic, refinement
from tests import tiny

KEY = prng.root(0)
CLASSES = 4
CONFIG = refinement.RefineSettings(
    steps=20, batch_size=8, learning_rate=1e-2, entropy_weight=0.5, distance_weight=0.1
)


def setting():
    """An ensemble of random experts, its teacher, a GAN and a generator."""
    network = tiny.classifier(CLASSES)
    ensemble = mosaic.build(
        "diagonal", {"net": network}, CLASSES, gate="none", gate_experts=1
    )
    keys = jax.random.split(prng.named(KEY, "experts"), CLASSES)
    # Last layers that are sure of what they say.
    experts = [
        model.replace(
            params=model.params
            | {"fc": jax.tree.map(lambda x: 10 * x, model.params["fc"])}
        )
        for model in (tiny.varied(network, key) for key in keys)
    ]
    models = jax.tree.map(lambda *leaf: jnp.stack(leaf), *experts)
    teacher = Teacher({"net": Experts(models, jnp.ones(CLASSES, bool))}, {}, experts[0])
    model_gan = gan.Gan(
        generator=dcgan.Generator(16, 1, 4),
        discriminator=dcgan.Discriminator(16, 4),
        classifier=network,
        tx=optax.adam(1e-3),
        latent_dim=5,
    )
    generator = model_gan.init(prng.named(KEY, "gan"), (16, 16, 1)).generator
    return ensemble, teacher, model_gan, generator


def test_loss_by_hand():
    logits = np.log(np.array([[0.5, 0.5, 1e-9], [0.9, 0.1, 1e-9]]))
    image = np.array([0.5, -0.5]).reshape(2, 1, 1, 1)
    found = refinement.loss(
        jnp.asarray(logits),
        jnp.asarray(image),
        jnp.zeros((2, 1, 1, 1)),
        share=jnp.array([0.25, 0.75, 0.0]),
        config=dataclasses.replace(CONFIG, distance_weight=2.0),
    )
    apart = 0.25 * np.log(0.25 / 0.7) + 0.75 * np.log(0.75 / 0.3)
    entropy = (np.log(2) - 0.9 * np.log(0.9) - 0.1 * np.log(0.1)) / 2
    assert float(found) == pytest.approx(apart + 0.5 * entropy + 2 * 0.25, rel=1e-5)


@pytest.mark.slow
def test_the_teacher_comes_to_name_what_the_client_holds():
    ensemble, teacher, model_gan, generator = setting()
    # The class that comes second before.
    before = seen(ensemble, teacher, model_gan, generator)
    share = jax.nn.one_hot(jnp.argsort(before)[-2], CLASSES)
    refined = refine(CONFIG, ensemble, teacher, model_gan, generator, share)
    after = seen(ensemble, teacher, model_gan, refined)
    assert share @ after > 1.2 * share @ before
    assert trees.digest(refined.batch_stats) == trees.digest(generator.batch_stats)


def refine(config, ensemble, teacher, model_gan, generator, share):
    @jax.jit
    def run(generator, key):
        return refinement.refine(
            config, ensemble, model_gan, teacher, generator, share, key
        )[0]

    return run(generator, prng.named(KEY, "client"))


def seen(ensemble, teacher, model_gan, generator):
    """Mean prediction of the teacher on new images, [K]."""
    image = refinement.drawn(model_gan, generator, prng.named(KEY, "new"), 64)
    return jnp.mean(jax.nn.softmax(ensemble.logits(teacher, image)), axis=0)


@pytest.mark.slow
def test_the_distance_holds_the_generator_back():
    ensemble, teacher, model_gan, generator = setting()
    share = jax.nn.one_hot(1, CLASSES)

    def moved(weight):
        config = dataclasses.replace(CONFIG, distance_weight=weight, steps=10)
        refined = refine(config, ensemble, teacher, model_gan, generator, share)
        before, after = (
            refinement.drawn(model_gan, each, prng.named(KEY, "new"), 32)
            for each in (generator, refined)
        )
        return float(jnp.mean((before - after) ** 2))

    assert moved(1000.0) < 0.5 * moved(0.0)


def test_named_are_shares_of_answers():
    logits = jnp.array([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    np.testing.assert_allclose(refinement.named(logits), [1 / 3, 2 / 3, 0])
