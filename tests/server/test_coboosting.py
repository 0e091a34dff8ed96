"""Co-Boosting: losses and whole rounds in NumPy, and samples that are moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import trees
from mosaic_jax.core.types import Teachers
from mosaic_jax.server import base
from tests import tiny
from tests.tiny import KEY

CLASSIFIER = tiny.classifier()
TASK = base.Task(CLASSIFIER, (16, 16, 1), 4, "none", "auto", "eval", 3, rounds=2)
STUDENT, TEACHER = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0]] * 2)


def method(**fields):
    small = {"batch_size": 4, "latent_dim": 3, "width": 2, "generator_steps": 1}
    return server.METHODS["coboosting"](**small | {"pool": 3} | fields)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def constant(model, *logits):
    """`model` with no features, whose logits are its bias, whatever it learns."""
    bn = jax.tree.map(jnp.zeros_like, model.params["bn"]) | {"bias": -jnp.ones(4)}
    fc = jax.tree.map(jnp.zeros_like, model.params["fc"]) | {"bias": jnp.array(logits)}
    return model.replace(params=model.params | {"bn": bn, "fc": fc})


def test_losses_by_hand():
    p = softmax(TEACHER)
    label = np.array([0, 1])
    right = p[np.arange(2), label]
    hard = np.mean((1 - right) ** 2 * -np.log(right))
    apart = 9 * np.mean(kl(softmax(TEACHER / 3), softmax(STUDENT / 3)))
    one = method(hardness=2.0, class_weight=0.5, boundary_weight=0.25)
    found = one.generator_loss(jnp.asarray(STUDENT), jnp.asarray(TEACHER), label)
    assert found == pytest.approx(0.5 * hard - 0.25 * apart, rel=1e-5)
    # How hard a sample is, is a constant of the gradient: (1 - p_y)^2 (p - one-hot).
    alone = method(hardness=2.0, boundary_weight=0.0)
    gradient = jax.grad(alone.generator_loss, argnums=1)(
        jnp.asarray(STUDENT), jnp.asarray(TEACHER), label
    )
    expected = (1 - right[:, None]) ** 2 * (p - np.eye(2)[label]) / 2
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    loss = 16 * np.mean(kl(softmax(TEACHER / 4), softmax(STUDENT / 4)))
    found = method().student_loss(jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    assert found == pytest.approx(loss, rel=1e-5)


def test_two_rounds_by_hand():
    """Clients 0 and 2 say the same to every image; client 1 has no labels."""
    told = np.array([[1.0, -1.0, 0.5, 0.0], [9.0, 9.0, 0.0, 0.0], [0.0, 2.0, 0.0, -1]])
    bias = np.array([0.3, 0.1, -0.2, 0.0])
    model = CLASSIFIER.init(KEY, (16, 16, 1))
    teachers = Teachers(
        trees.stack([constant(model, *one) for one in told]),
        jnp.array([[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 9, 9]]),
        jnp.arange(3),
    )
    one = method(student_learning_rate=0.5, weight_decay=0.1, weight_step=0.05)
    student = constant(model, *bias)
    state = one.init(TASK, student, KEY)
    np.testing.assert_allclose(state.weight, 1 / 3)
    step = jax.jit(functools.partial(one.train, TASK))
    weight, speed = np.full(3, 1 / 3), 0.0
    for number in range(2):
        key = jax.random.fold_in(KEY, number)
        labels = np.asarray(state.label)[:number].ravel()
        state, student, metrics = step(state, student, teachers, key, number)
        if number:
            # d CE / d w_i = <softmax(A) - mean one-hot, f_i - A> / (w_0 + w_2).
            shares = np.array([0.5, 0.0, 0.5])
            mean = shares @ told
            slope = softmax(mean) - np.eye(4)[labels].mean(axis=0)
            signs = np.sign((told - mean) @ slope) * [1, 0, 1]
            weight = weight - 0.05 * 0.99 * signs
            assert set(signs) == {-1, 0, 1}
        shares = weight * [1, 0, 1] / weight[[0, 2]].sum()
        target = softmax(shares @ told / 4)
        losses = []
        for _ in range(number + 1):  # batches in the pool
            losses.append(16 * kl(target, softmax(bias / 4)))
            gradient = 4 * (softmax(bias / 4) - target) + 0.1 * bias
            speed = 0.9 * speed + gradient
            bias = bias - 0.5 * (1 + np.cos(np.pi * number / 2)) / 2 * speed
        np.testing.assert_allclose(state.weight, weight, rtol=1e-5)
        np.testing.assert_allclose(student.params["fc"]["bias"], bias, rtol=1e-4)
        np.testing.assert_allclose(metrics["student_loss"], np.mean(losses), rtol=1e-4)


@pytest.mark.slow
def test_samples_are_moved_to_where_the_teacher_answers_otherwise():
    keys = jax.random.split(jax.random.key(5), 2)
    clients = trees.stack([tiny.varied(CLASSIFIER, key) for key in keys])
    teachers = Teachers(clients, jnp.ones((2, 4)), jnp.arange(2))
    weight, one = jnp.array([0.25, 0.75]), method(move=0.01)
    image = jax.random.uniform(jax.random.key(1), (3, 16, 16, 1), minval=-0.9)
    u = jax.random.normal(jax.random.key(2), (3, 4))

    def answer(image):
        logits = jax.vmap(lambda model: CLASSIFIER.logits(model, image))(clients)
        mean = (0.25 * logits[0] + 0.75 * logits[1]) / 4
        return jnp.sum(u * jax.nn.softmax(mean), axis=-1)

    moved = one.moved(TASK, teachers, weight, image, u)
    assert np.all(answer(moved) > answer(image))
    # A pixel that no feature sees stays.
    far = np.abs(moved - image)
    assert np.all(np.isclose(far, 0.02, rtol=1e-4) | (far == 0))
    assert np.mean(far > 0) > 0.9


@pytest.mark.slow
def test_equal_weights_stay_where_the_step_is_0():
    model = CLASSIFIER.init(KEY, (16, 16, 1))
    teachers = Teachers(trees.stack([model] * 3), jnp.ones((3, 4)), jnp.arange(3))
    one = method(weight_step=0.0, move=0.0)
    state = one.init(TASK, model, KEY)
    for number in range(2):
        state, _, _ = one.train(TASK, state, model, teachers, KEY, number)
    np.testing.assert_array_equal(state.weight, jnp.full(3, 1 / 3))
    assert state.count == 2
