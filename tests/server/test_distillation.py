"""Mosaic's distillation: its pool, and what images count by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.types import LabelledImages
from mosaic_jax.data import augment
from mosaic_jax.server import distillation
from mosaic_jax.server.base import Task
from mosaic_jax.server.distillation import Distillation, DistillSettings
from tests import tiny
from tests.server import test_refinement

KEY = prng.root(0)
CLIENTS, CLASSES = 2, 4


def setting(**fields):
    """The method, its task, what teaches and a student."""
    ensemble, teacher, model_gan, generator = test_refinement.setting()
    other = model_gan.init(prng.named(KEY, "other"), (16, 16, 1)).generator
    method = Distillation(
        config=DistillSettings(samples_per_generator=4, **fields),
        ensemble=ensemble,
        model_gan=model_gan,
        num_clients=CLIENTS,
    )
    network = tiny.classifier(CLASSES)
    task = Task(
        classifier=network,
        image_shape=(16, 16, 1),
        num_classes=CLASSES,
        augmentation="none",
        lowering="auto",
        batch_norm="eval",
        num_clients=CLIENTS,
    )
    teachers = distillation.EnsembleAndGenerators(
        teacher=teacher,
        generators=jax.tree.map(lambda *x: jnp.stack(x), generator, other),
        weight=jnp.ones(CLIENTS),
        label_count=jnp.array([[5, 5, 0, 0], [10, 0, 0, 0]]),
        pool=(),
        held_out={},
    )
    student = tiny.varied(network, prng.named(KEY, "student"))
    return method, task, teachers, student


def blank(size):
    return distillation.Pool(
        image=jnp.zeros((CLIENTS, size, 16, 16, 1), jnp.uint8),
        logits=jnp.zeros((CLIENTS, size, CLASSES)),
    )


@pytest.mark.slow
def test_the_pool_has_every_generators_images_and_what_the_teacher_says_of_them():
    # The second of two steps of four images overlaps the first.
    method, _, teachers, _ = setting(pool=6)
    pool, keys = blank(6), [prng.at(KEY, number) for number in range(2)]
    for number, key in enumerate(keys):
        pool = method.fill(pool, teachers, key, jnp.array(number))
    first, last = (
        distillation.generate(
            method.model_gan, teachers.generators, jax.random.clone(key), 4, CLIENTS
        ).reshape(CLIENTS, 4, 16, 16, 1)
        for key in keys
    )
    drawn = np.concatenate([first[:, :2], last], axis=1)
    np.testing.assert_array_equal(pool.image, augment.to_uint8(jnp.asarray(drawn)))
    logits = method.ensemble.logits(
        teachers.teacher, jnp.asarray(drawn.reshape(-1, 16, 16, 1))
    )
    tiny.close(pool.logits, logits.reshape(CLIENTS, 6, CLASSES))


def test_a_student_of_a_pool_learns_what_the_teacher_said_of_it():
    method, task, teachers, student = setting(pool=4, learning_rate=0.05)
    pool = jax.jit(method.fill)(blank(4), teachers, prng.named(KEY, "pool"), 0)
    # Said of the images are other things than the teacher would say now.
    logits = 5 * jax.nn.one_hot(jnp.full((CLIENTS, 4), 3), CLASSES)
    pool = jax.jit(method.filled)(dataclasses.replace(pool, logits=logits), teachers)
    teachers = dataclasses.replace(teachers, pool=pool)
    state = method.init(task, student, KEY)

    @jax.jit
    def train(state, model, teachers, key, number):
        return method.train(task, state, model, teachers, key, number)

    for number in range(20):
        key = prng.at(prng.named(KEY, "train"), number)
        state, student, metrics = train(state, student, teachers, key, number)
    assert float(metrics["agreement"]) == 1


@pytest.mark.parametrize("weight", [[1.0, 1, 1, 1], [2.0, 2, 0, 2]])
def test_weights_by_class_have_the_sums_of_its_shares(weight):
    logits = jnp.eye(3)[jnp.array([0, 0, 1, 1])]
    found = distillation.by_class(
        jnp.array(weight), logits, jnp.array([0.25, 0.5, 0.25])
    )
    named = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(named @ found, [0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found[0] / found[1], weight[0] / weight[1])


@pytest.mark.slow
def test_only_images_of_the_clients_own_classes_count():
    # Of the first client's images 0 and 3 show its classes, of the second's only 2.
    said = jnp.array([[1, 2, 3, 0], [1, 2, 0, 3]])
    method, _, teachers, _ = setting(pool=4, own_classes=True)
    pool = dataclasses.replace(blank(4), logits=5 * jax.nn.one_hot(said, CLASSES))
    image = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4, 1, 1, 1)
    pool = dataclasses.replace(pool, image=pool.image + image)
    pool = method.filled(pool, teachers)
    np.testing.assert_allclose(pool.weight, [1, 0, 0, 1, 0, 0, 1, 0])
    found = set()
    for number in range(6):
        drawn, logits = method._from_pool(pool, prng.at(KEY, number))
        numbers = augment.to_uint8(drawn)[:, 0, 0, 0].tolist()
        found |= set(zip(numbers, np.argmax(logits, -1).tolist(), strict=True))
    assert found == {(0, 1), (3, 0), (6, 0)}
    # Balanced, the three images of class 0 (one) and class 0 and 1 have 15 : 5 labels.
    balanced = dataclasses.replace(
        method, config=dataclasses.replace(method.config, balanced=True)
    )
    weight = balanced.filled(pool, teachers).weight
    np.testing.assert_allclose(
        weight[np.array([0, 3, 6])], [0.25, 0.375, 0.375], rtol=1e-5
    )


def test_where_no_image_would_count_those_of_living_generators_do():
    method, _, teachers, _ = setting(pool=4, own_classes=True)
    teachers = dataclasses.replace(teachers, weight=jnp.array([1.0, 0.0]))
    said = jnp.full((2, 4), 3)
    pool = dataclasses.replace(blank(4), logits=5 * jax.nn.one_hot(said, CLASSES))
    np.testing.assert_array_equal(
        method.filled(pool, teachers).weight, [1, 1, 1, 1, 0, 0, 0, 0]
    )


def test_what_counts_as_held_goes_by_the_number_of_classes():
    """Of 100 classes in equal shares a client holds all."""
    assert distillation.holds(np.full((1, 100), 3)).all()
    count = np.zeros((1, 100), int)
    count[0, :3] = 989, 10, 1
    assert distillation.holds(count)[0, :4].tolist() == [True, True, True, False]
    # Of ten classes one image in a thousand is too few, one in a hundred is not.
    assert distillation.holds(count[:, :10])[0, :4].tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.slow
def test_unsure_answers_on_held_out_images_do_not_count():
    method, task, teachers, student = setting(source="validation", min_confidence=0.99)
    image = np.random.RandomState(0).randint(0, 256, (9, 16, 16, 1)).astype(np.uint8)
    held_out = LabelledImages(jnp.asarray(image), jnp.zeros(9, jnp.int32))
    teachers = dataclasses.replace(teachers, held_out={"validation": held_out})
    unsure = dataclasses.replace(method, ensemble=Same(task.classifier, student))
    state = method.init(task, student, KEY)
    key = prng.named(KEY, "step")
    _, after, _ = unsure.train(task, state, student, teachers, key, jnp.array(0))
    assert trees.digest(after) == trees.digest(student)


def test_focus_leaves_out_what_the_student_knows():
    method, task, teachers, student = setting(focus=1.0)
    known = dataclasses.replace(method, ensemble=Same(task.classifier, student))
    state = method.init(task, student, KEY)
    key = prng.named(KEY, "step")
    _, after, metrics = known.train(task, state, student, teachers, key, jnp.array(0))
    assert abs(float(metrics["loss"])) < 1e-5
    _, after, metrics = method.train(
        task, state, student, teachers, jax.random.clone(key), jnp.array(0)
    )
    assert float(metrics["loss"]) > 1e-3
    assert trees.digest(after) != trees.digest(student)


class Same:
    """A teacher that says what the student does."""

    def __init__(self, classifier, model):
        self._classifier, self._model = classifier, model

    def logits(self, teacher, image):
        del teacher
        return self._classifier.logits(self._model, image)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distill__pool": 4}, "distill.pool = 4: must be 0, or >="),
        (
            {"distill__pool": 64, "distill__source": "validation"},
            "distill.pool = 64: must be 0 for distill.source = 'validation'",
        ),
    ],
)
def test_pools_that_cannot_be(fields, said):
    with pytest.raises(errors.ConfigError, match=said):
        tiny.study(**fields)
