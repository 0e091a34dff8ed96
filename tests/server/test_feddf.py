"""FedDF: steps of Adam in NumPy, and whose images count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import errors, trees
from mosaic_jax.core.types import Generators, Teachers
from mosaic_jax.fl import gan
from mosaic_jax.run import study as studies
from mosaic_jax.server import base
from mosaic_jax.stages.health import check_alive
from tests import tiny
from tests.tiny import KEY, close

CLASSIFIER = tiny.classifier()
RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Info:
    """What a GAN must know of a data set."""

    image_shape = (16, 16, 1)
    channels = 1


GAN = gan.build(tiny.study(), Info(), CLASSIFIER)
TASK = base.Task(
    CLASSIFIER, (16, 16, 1), 4, "none", "auto", "eval", 3, rounds=2, gan=GAN
)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@functools.cache
def generators(seed):
    """Two generators of unlike images, the second of which has collapsed."""

    def one(seed):
        key = jax.random.key(seed)
        model = GAN.init(key, (16, 16, 1)).generator
        leaves, structure = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.clone(key), len(leaves))
        noise = [
            0.3 * jnp.abs(jax.random.normal(key, leaf.shape))
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.map(jnp.add, model, jax.tree.unflatten(structure, noise))

    return Generators(trees.stack([one(0), one(seed)]), jnp.array([True, False]))


def constant(model, *logits):
    """`model` with no features, whose logits are its bias, whatever it learns."""
    bn = jax.tree.map(jnp.zeros_like, model.params["bn"]) | {"bias": -jnp.ones(4)}
    fc = model.params["fc"] | {"bias": jnp.array(logits)}
    return model.replace(params=model.params | {"bn": bn, "fc": fc})


def train(student, teachers, rounds=1, steps=2):
    method = server.METHODS["feddf"](
        steps=steps, samples_per_generator=4, learning_rate=RATE
    )
    state = method.init(TASK, student, KEY)
    step = jax.jit(functools.partial(method.train, TASK))
    for number in range(rounds):
        key = jax.random.fold_in(KEY, number)
        state, student, metrics = step(state, student, teachers, key, number)
    return student, metrics


def test_steps_by_hand():
    """Adam on the gradient softmax(s) - softmax(m) of KL, its rate by half a cosine.

    The third client has no labels and must not count in the mean m.
    """
    model = CLASSIFIER.init(KEY, (16, 16, 1))
    told = np.array([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 0.0, -1.0], [9.0, 0, 0, 0]])
    teachers = Teachers(
        trees.stack([constant(model, *one) for one in told]),
        jnp.array([[1, 2, 0, 0], [0, 0, 9, 9], [0, 0, 0, 0]]),
        jnp.arange(3),
        generators(1),
    )
    bias = np.array([0.3, 0.1, -0.2, 0.0])
    student, metrics = train(constant(model, *bias), teachers, rounds=2, steps=1)
    mean, first, second = told[:2].mean(axis=0), 0.0, 0.0
    p = softmax(mean)
    for number in range(2):
        q = softmax(bias)
        loss = np.sum(p * np.log(p / q))
        gradient = q - p
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9 ** (number + 1))
        move /= np.sqrt(second / (1 - 0.999 ** (number + 1))) + 1e-8
        bias = bias - RATE * (1 + np.cos(np.pi * number / 2)) / 2 * move
    np.testing.assert_allclose(student.params["fc"]["bias"], bias, rtol=1e-4)
    np.testing.assert_allclose(metrics["student_loss"], loss, rtol=1e-4)


@pytest.fixture(scope="module")
def models():
    keys = jax.random.split(jax.random.key(5), 3)
    return [tiny.varied(CLASSIFIER, key) for key in keys]


def taught(models, *order, seed=1):
    student, *clients = models
    teachers = trees.stack([clients[i] for i in order])
    labels = jnp.ones((len(order), 4), jnp.int32)
    given = Teachers(teachers, labels, jnp.array(order), generators(seed))
    return train(student, given)[0]


def test_order_of_clients_and_collapsed_generators_change_nothing(models):
    found = taught(models, 0, 1)
    close(taught(models, 1, 0), found)
    close(taught(models, 0, 1, seed=2), found)
    moved = found.params["conv"]["kernel"] - models[0].params["conv"]["kernel"]
    assert np.abs(moved).max() > 1e-3
    assert not np.allclose(
        taught(models, 0, 0).params["fc"]["bias"], found.params["fc"]["bias"]
    )


def test_nothing_is_to_learn_from_clients_that_agree(models):
    student = models[0]
    given = Teachers(
        trees.stack([student] * 2), jnp.ones((2, 4)), jnp.arange(2), generators(1)
    )
    _, metrics = train(student, given, steps=1)
    assert abs(metrics["student_loss"]) < 1e-6


def test_generators_are_sent_once_and_some_must_be_alive():
    with pytest.raises(errors.ConfigError) as error:
        studies.build(tiny.study(method="federated", server__method="feddf"))
    assert str(error.value) == (
        "server.when = 'every_round': must be once for server.method = 'feddf', as"
        " clients send generators once"
    )
    nobody = generators(1).replace(alive=jnp.zeros(2, bool))
    with pytest.raises(errors.MosaicError, match="generators: all have collapsed"):
        check_alive(nobody, 0.05)
