"""Networks that know nothing of the library."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


class Nnx(nnx.Module):
    """`Compact`, of the newer kind; nothing says `train`."""

    def __init__(self, width=4, rate=None, *, rngs):
        self.conv = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs) if rate else lambda x: x
        self.last = nnx.List([nnx.Linear(width, 5, rngs=rngs)])
        self.last.append(nnx.Linear(5, CLASSES, rngs=rngs))

    def __call__(self, x):
        x = self.norm(nnx.relu(self.conv(x))).mean((1, 2))
        return self.last[1](self.drop(nnx.relu(self.last[0](x))))


class NnxNamed(nnx.Module):
    """Methods of the library's names, and `train` by name."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(64, 5, rngs=rngs)
        self.end = nnx.Linear(5, CLASSES, rngs=rngs)

    def features(self, x):
        return nnx.relu(self.first(x.reshape(len(x), -1)))

    def head(self, features):
        return 2 * self.end(features)

    def __call__(self, x, train):
        return self.head(self.features(x)) if not train else 1 / 0


NETWORKS = {"compact": Compact(), "nested": Nested(), "named": Named()}
NETWORKS["layers"] = layers()
NETWORKS["nnx"] = nnx.bridge.to_linen(Nnx, width=4)
NETWORKS["nnx named"] = nnx.bridge.to_linen(NnxNamed)


def prepared(network):
    """The network as the library has it, its variables and images."""
    adapted = Handed(network).build(CLASSES, SHAPE)
    hash(adapted)  # classifiers remember what they counted by it
    image = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    variables = adapted.init(jax.random.key(0), image, train=False)
    return adapted, variables, image


def evaluated(network, variables, image):
    """Logits by running statistics, without the library."""
    if not isinstance(network, nnx.bridge.ToLinen):
        return network.apply(variables, image)

    def run(module, image):
        module.eval()
        given = {"train": False} if isinstance(module, NnxNamed) else {}
        return module(image, **given)

    return network.apply(variables, image, nnx_method=run)


@pytest.mark.parametrize("name", NETWORKS)
def test_head_and_features_are_the_network(name):
    adapted, variables, image = prepared(NETWORKS[name])
    expected = evaluated(NETWORKS[name], variables, image)
    features = adapted.apply(variables, image, train=False, method="features")
    assert features.shape == (3, 5)
    found = adapted.apply(variables, features, method="head")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = adapted.apply(variables, image, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_network_of_nnx_learns_as_its_linen_twin():
    """Same variables by other names: same loss, gradients and running moments."""
    of_linen, linen_variables, image = prepared(Compact())
    of_nnx, variables, _ = prepared(NETWORKS["nnx"])
    twins = {"conv": "Conv_0", "norm": "BatchNorm_0"}

    def renamed(tree):
        last = {0: tree.get("Dense_1"), 1: tree.get("Dense_0")}
        found = {new: tree[old] for new, old in twins.items() if old in tree}
        return found | ({"last": last} if last[0] else {})

    @functools.partial(jax.jit, static_argnums=0)
    def step(adapted, variables):
        def loss(params):
            logits, updated = adapted.apply(
                variables | {"params": params},
                image,
                train=True,
                mask=jnp.array([True, True, False]),
                mutable=["batch_stats"],
            )
            return (logits[:2] ** 2).sum(), updated["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    (loss, stats), grad = step(of_linen, linen_variables)
    given = {
        "params": renamed(linen_variables["params"]),
        "batch_stats": renamed(linen_variables["batch_stats"]),
    }
    shapes = [jax.tree.map(jnp.shape, one) for one in (given, dict(variables))]
    assert shapes[0] == shapes[1]
    (other_loss, other_stats), other_grad = step(of_nnx, given)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for one, other in ((grad, other_grad), (stats, other_stats)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            renamed(one),
            dict(other),
        )


@pytest.mark.parametrize("name", ["compact", "nnx"])
def test_batch_norm_counts_the_images_of_the_mask(name):
    adapted, variables, image = prepared(NETWORKS[name])
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
        (
            nnx.bridge.to_linen(Nnx, rate=0.5),
            "model = Nnx: has dropout at drop: must have none, as there are no random",
        ),
        (
            nnx.bridge.to_linen(nnx.Linear, 1, CLASSES),
            r"model = Linear: must end in a layer from features \[B, F\] to logits",
        ),
        (
            nnx.bridge.to_linen(nnx.Linear, 7, CLASSES),
            r"model = Linear: cannot be applied to images \(8, 8, 1\): TypeError",
        ),
    ],
)
def test_what_cannot_be_adapted(network, told):
    with pytest.raises(errors.ConfigError, match=told):
        Handed(network).build(CLASSES, SHAPE)
