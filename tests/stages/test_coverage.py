"""What the teacher sees on generated images, and what is told of it."""

import logging

import numpy as np

from mosaic_jax.stages.coverage import Coverage

# Client 7 holds class 0 and is seen as such; client 9 holds class 1, and most of its
# images are taken for class 0; client 4 collapsed. Nobody holds class 3.
FOUND = Coverage(
    number=np.array([7, 9, 4]),
    alive=np.array([True, True, False]),
    label_count=np.array([[50, 0, 0, 0], [0, 90, 10, 0], [0, 0, 7, 0]]),
    seen=np.array([[1.0, 0, 0, 0], [0.9, 0.05, 0.05, 0], [0, 0, 1.0, 0]]),
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
    told = FOUND.outcome(card="classes seen")
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
