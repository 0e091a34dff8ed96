"""Gradient inversion: its parts by hand, and images that a gradient gives away."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core.types import Batch
from mosaic_jax.fl import inversion, training
from mosaic_jax.nn.classifier import Classifier


class Smooth(nn.Module):
    """Two layers whose gradients have gradients everywhere."""

    num_classes: int = 3

    def setup(self):
        self.first, self.fc = nn.Dense(32), nn.Dense(self.num_classes)

    def features(self, x, *, train, mask=None):
        return nn.sigmoid(self.first(x.reshape(len(x), -1)))

    def head(self, features):
        return self.fc(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train))


def test_cosine_distance_and_total_variation_by_hand():
    a = {"x": jnp.array([1.0, 0.0]), "y": jnp.array([0.0])}
    b = {"x": jnp.array([0.0, 0.0]), "y": jnp.array([3.0])}
    assert inversion.cosine_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert inversion.cosine_distance(a, b) == pytest.approx(1)
    assert inversion.cosine_distance(a, {"x": -2 * a["x"], "y": a["y"]}) == 2
    image = jnp.array([[0.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 2, 1)
    assert inversion.total_variation(image) == pytest.approx(1.0)
    assert inversion.total_variation(jnp.ones((2, 4, 4, 3))) == 0


def test_psnr_is_of_the_best_order():
    image = np.stack([np.full((2, 2, 1), value) for value in (-1.0, 0.0, 1.0)])
    value, order = inversion.psnr(image[[2, 0, 1]], image)
    assert value == 100 and order.tolist() == [1, 2, 0]
    # A mean square error of 0.04 on a scale of 2.
    value, _ = inversion.psnr(image[:1] + 0.2, image[:1])
    assert value == pytest.approx(20.0)


def test_an_image_is_found_by_its_gradient():
    network = Classifier(Smooth(), (0.5,), (0.5,))
    label = jnp.array([1])
    tx = optax.adam(optax.cosine_decay_schedule(0.1, 300))

    @jax.jit
    def found(image):
        model = network.init(jax.random.key(0), (4, 4, 1))
        batch = Batch(image, label, jnp.ones(1, bool))
        sent, _ = training.gradient(network, model, batch)

        def body(_, state):
            guess, opt_state = state
            slope = jax.grad(inversion.objective, argnums=2)(
                network, model, guess, label, sent, 0.0
            )
            update, opt_state = tx.update(jnp.sign(slope), opt_state)
            return guess + update, opt_state

        guess = jnp.zeros_like(image)
        return jax.lax.fori_loop(0, 300, body, (guess, tx.init(guess)))[0]

    image = np.random.RandomState(0).uniform(-0.9, 0.9, (1, 4, 4, 1))
    assert inversion.psnr(np.asarray(found(image)), image)[0] > 30
