"""Networks that know nothing of the library."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.nn.adapted import Handed

SHAPE, CLASSES = (8, 8, 1), 3


class Compact(nn.Module):
    """Layers without names, batch-norm, and `train` alone."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=not train)(x).mean((1, 2))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(5)(x)))


class Nested(nn.Module):
    """The head lies two levels down, and nothing says `train`."""

    def setup(self):
        self.body = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(CLASSES)])

    def __call__(self, x):
        return self.body(x.reshape(len(x), -1))


class Named(nn.Module):
    """Methods of the library's names; the head is no single layer."""

    def setup(self):
        self.first, self.last = nn.Dense(5), nn.Dense(CLASSES)

    def features(self, x):
        return nn.relu(self.first(x.reshape(len(x), -1)))

    def head(self, features):
        return 2 * self.last(features)

    def __call__(self, x):
        return self.head(self.features(x))


def layers():
    flat = [lambda x: x.reshape(len(x), -1), nn.Dense(5)]
    return nn.Sequential([*flat, nn.relu, nn.Dense(CLASSES)])


NETWORKS = {"compact": Compact(), "nested": Nested(), "named": Named()}
NETWORKS["layers"] = layers()


def prepared(network):
    """The network as the library has it, its variables and images."""
    adapted = Handed(network).build(CLASSES, SHAPE)
    hash(adapted)  # classifiers remember what they counted by it
    image = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    variables = adapted.init(jax.random.key(0), image, train=False)
    return adapted, variables, image


@pytest.mark.parametrize("name", NETWORKS)
def test_head_and_features_are_the_network(name):
    adapted, variables, image = prepared(NETWORKS[name])
    expected = NETWORKS[name].apply(variables, image)
    features = adapted.apply(variables, image, train=False, method="features")
    assert features.shape == (3, 5)
    found = adapted.apply(variables, features, method="head")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = adapted.apply(variables, image, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_batch_norm_counts_the_images_of_the_mask():
    adapted, variables, image = prepared(Compact())
    mask = jnp.array([True, True, False])

    def train(image):
        return adapted.apply(
            variables, image, train=True, mask=mask, mutable=["batch_stats"]
        )

    logits, updated = train(image)
    other_logits, other_updated = train(image.at[2].set(9.0))
    np.testing.assert_array_equal(logits[:2], other_logits[:2])
    jax.tree.map(np.testing.assert_array_equal, updated, other_updated)


class Headless(nn.Module):
    """What comes last is no layer."""

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(CLASSES)(x.reshape(len(x), -1)))


class Broken(nn.Module):
    """It cannot be applied."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(x.reshape(7, -1, 5))


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Headless(), r"model = Headless: must end in a layer from features \[B, F\]"),
        (Broken(), r"model = Broken: cannot be applied to images \(8, 8, 1\): Type"),
    ],
)
def test_what_cannot_be_adapted(network, told):
    with pytest.raises(errors.ConfigError, match=told):
        Handed(network).build(CLASSES, SHAPE)
