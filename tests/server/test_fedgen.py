"""FedGen: its losses in NumPy, and what clients make of the generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.types import Batch, Teachers
from mosaic_jax.fl import algorithms
from mosaic_jax.fl.local_sgd import Seen, with_lesson
from mosaic_jax.run import study as studies
from mosaic_jax.server import base
from tests import tiny
from tests.tiny import KEY

CLASSIFIER = tiny.classifier()
TASK = base.Task(CLASSIFIER, (16, 16, 1), 4, "none", "auto", "eval", 3)
COUNTS = jnp.array([[6, 0, 2, 0], [2, 4, 2, 0]])


def method(**fields):
    small = {"batch_size": 6, "latent_dim": 3, "hidden": 5, "steps": 2}
    return server.METHODS["fedgen"](**small | fields)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def teachers():
    keys = jax.random.split(jax.random.key(5), 2)
    models = trees.stack([tiny.varied(CLASSIFIER, key) for key in keys])
    return Teachers(models, COUNTS, jnp.arange(2))


@functools.cache
def model():
    return tiny.varied(CLASSIFIER, jax.random.key(9))


def generated(generator, z, label):
    """Features by running statistics, in NumPy."""
    params = jax.tree.map(np.asarray, generator.params)
    stats = jax.tree.map(np.asarray, generator.batch_stats["BatchNorm_0"])
    x = np.concatenate([z, np.eye(4)[label]], axis=-1)
    x = x @ params["Linear_0"]["kernel"] + params["Linear_0"]["bias"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    x = x * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    x = np.maximum(x, 0) @ params["Linear_1"]["kernel"]
    return x + params["Linear_1"]["bias"]


def test_generator_loss_by_hand():
    logits = np.array([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 1.0]]])
    label, weight = np.array([0, 1]), np.array([[0.75, 0.5], [0.25, 0.5]])
    each = -np.log(softmax(logits))[:, np.arange(2), label]
    expected = np.mean(np.sum(weight * each, axis=0)) + 0.5 * 0.3
    found = method(diversity_weight=0.5).generator_loss(
        jnp.asarray(logits), jnp.asarray(label), jnp.asarray(weight), jnp.array(0.3)
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_training_lowers_the_loss_and_leaves_the_model(teachers):
    one = method(steps=60, learning_rate=0.01)
    state = one.init(TASK, model(), KEY)
    step = jax.jit(functools.partial(one.train, TASK))
    found = []
    for number in range(2):
        state, after, metrics = step(state, model(), teachers, KEY, number)
        found.append(float(metrics["generator_loss"]))
    assert found[1] < 0.9 * found[0]
    assert trees.digest(after) == trees.digest(model())
    np.testing.assert_allclose(state.share, np.array([8, 4, 4, 0]) / 16)


def test_penalty_by_hand(teachers):
    one = method(label_weight=2.0, match_weight=3.0, decay=0.5)
    state, _, _ = one.train(
        TASK, one.init(TASK, model(), KEY), model(), teachers, KEY, 0
    )
    features = jax.random.uniform(jax.random.key(1), (4, 4))
    own = np.array([0, 2, 1, 0])
    mask = np.array([True, True, False, True])
    turn = tiny.turn(model=model(), number=2).replace(lesson=one.lesson(state))
    batch = Batch(image=jnp.zeros((4, 16, 16, 1)), label=own, mask=mask)
    seen = Seen(turn, batch, features, jnp.array(0), jax.random.key(7), TASK.classifier)
    found = one.penalty(TASK, model().params, seen)

    def draw(name):
        key = prng.named(seen.key, name)
        return np.asarray(jax.random.normal(key, (4, 3)))

    label = np.asarray(base.draw_labels(prng.named(seen.key, "label"), state.share, 4))
    fc = jax.tree.map(np.asarray, model().params["fc"])
    drawn, target, said = (
        x @ fc["kernel"] + fc["bias"]
        for x in (
            generated(state.generator.model, draw("drawn"), label),
            generated(state.generator.model, draw("own"), own),
            np.asarray(features),
        )
    )
    told = -np.log(softmax(drawn))[np.arange(4), label].mean()
    p, q = softmax(target), softmax(said)
    apart = np.sum(p * np.log(p / q), axis=-1)[mask].mean()
    assert found == pytest.approx(0.25 * (2 * told + 3 * apart), rel=1e-4)
    # The target is a constant: the head learns to say it of the images.
    only = method(label_weight=0.0, match_weight=1.0, decay=1.0)
    gradient = jax.grad(functools.partial(only.penalty, TASK))(model().params, seen)
    expected = ((q - p)[mask] / mask.sum()).sum(axis=0)
    np.testing.assert_allclose(gradient["fc"]["bias"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_clients_start_without_it():
    """The first round is FedAvg's; from the second on the generator counts."""
    data = tiny.dataset([10, 19, 8])

    def after(count, **fields):
        return tiny.run_rounds(algorithms.FedAvg(), count, data=data, **fields)[0].model

    taught = {"server": method(), "task": TASK}
    tiny.close(after(1), after(1, **taught))
    plain, found = after(2), after(2, **taught)
    assert not tiny.are_close(plain, found)
    off = method(label_weight=0.0, match_weight=0.0)
    tiny.close(plain, after(2, **taught | {"server": off}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"server__when": "once"},
            "server.when = 'once': must be every_round for server.method = 'fedgen',"
            " which teaches the clients",
        ),
        (
            {"init__method": "heterofl"},
            "init.method = 'heterofl': must train whole networks for server.method ="
            " 'fedgen', which teaches their heads",
        ),
    ],
)
def test_what_it_cannot_teach(changes, expected):
    study = tiny.study(method="federated", server__method="fedgen", **changes)
    with pytest.raises(errors.ConfigError) as error:
        studies.build(study)
    assert str(error.value) == expected
    with pytest.raises(errors.ConfigError, match="clients run object: must run Local"):
        with_lesson(object(), method().penalty)
