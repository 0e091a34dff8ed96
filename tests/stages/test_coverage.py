"""What the teacher sees on generated images, and what is told of it."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.stages.coverage import GENERATED, REAL, Best, Coverage

# Client 7 holds class 0 and is seen as such; client 9 holds class 1, and most of its
# images are taken for class 0; client 4 collapsed. Nobody holds class 3.
FOUND = Coverage(
    number=np.array([7, 9, 4]),
    alive=np.array([True, True, False]),
    label_count=np.array([[50, 0, 0, 0], [0, 90, 10, 0], [0, 0, 7, 0]]),
    seen=np.array([[1.0, 0, 0, 0], [0.9, 0.05, 0.05, 0], [0, 0, 1.0, 0]]),
    generated=np.ones((4, 8, 16, 16, 1), np.uint8),
)


def test_overlap_with_the_clients_labels():
    np.testing.assert_allclose(FOUND.of_own, [1, 0.1, 1])


def test_classes_by_the_images_of_living_generators():
    np.testing.assert_allclose(FOUND.of_classes, [1, 0.05 / 0.9, 0.5, np.nan])
    assert FOUND.lost == [1]


def test_it_is_logged_by_class_and_by_client(caplog):
    with caplog.at_level(logging.WARNING):
        FOUND.tell()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("hardly seen on generated images")
    assert lines[0].endswith("classes 1, held by client 9")
    assert lines[1].endswith("classes on less than 50 % of the images of client 9")


def test_the_summary_has_the_least_covered_class():
    told = FOUND.outcome(np.zeros_like(FOUND.generated))
    number = told["headline"]["class_coverage"]
    assert number["card"] == "classes seen"
    np.testing.assert_allclose(number["low"], 0.05 / 0.9)
    np.testing.assert_allclose(number["mean"], (1 + 0.05 / 0.9 + 0.5) / 3)
    assert told["results"]["lost_classes"] == [1]
    assert told["clients"]["own classes on its images"] == {
        7: "100 %",
        9: "10 %",
        4: "100 %",
    }


def test_the_report_has_images_of_each_class():
    told = FOUND.outcome(np.zeros_like(FOUND.generated))
    grid = told["section"].blocks[-1]
    assert grid.caption.startswith("Images of each class that")
    assert grid.names == ["class 0", "class 1", "class 2", "class 3"]
    assert list(grid.columns) == [REAL, GENERATED]
    assert told["pictures"][GENERATED] is FOUND.generated
    some = dataclasses.replace(FOUND, generated=FOUND.generated[:2])
    grid = some.section().blocks[-1]
    assert grid.caption.startswith("Images of each of the first 2 classes that")
    assert grid.names == ["class 0", "class 1"]


def test_the_surest_images_of_all_generators_that_count():
    # The image of generator g and number i is filled with 10 g + i + 1.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 10, 3)).astype(np.float32)
    logits[..., 2] -= 10  # never named
    alive = np.array([True, True, False, True])
    value = 10 * np.arange(4)[:, None] + np.arange(10) + 1
    image = np.broadcast_to(value[..., None, None, None], (4, 10, 2, 2, 1))
    best = Best.none(3, (2, 2, 1))
    for g in range(4):
        given = jnp.asarray(image[g], jnp.uint8), jnp.asarray(logits[g])
        best = best.with_images(*given, jnp.asarray(alive[g]))
    certainty = np.asarray(jax.nn.softmax(logits))
    for k in (0, 1):
        takes = (logits.argmax(-1) == k) & alive[:, None]
        order = np.argsort(-np.where(takes, certainty[..., k], 0), axis=None)
        want = value.reshape(-1)[order][: min(8, takes.sum())]
        found = np.asarray(best.image)[k, :, 0, 0, 0]
        np.testing.assert_array_equal(found[: len(want)], want)
        assert not found[len(want) :].any()
    assert not np.asarray(best.image)[2].any()
