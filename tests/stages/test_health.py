"""What is told of generators without data."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng
from mosaic_jax.core.types import Generators
from mosaic_jax.stages import health
from tests import tiny

FIELDS = {
    "number": np.array([3, 5, 8, 9]),
    "deviation": np.array([0.2, 0.3, 0.01, 0.2]),
    "contrast": np.array([0.5, 0.1, 0.5, 0.6]),
    "nearest": np.array([0.5, 0.4, 0.5, 0.05]),
    "moments": np.array([0.2, 0.2, 0.2, 0.9]),
    "collapse_below": 0.05,
}


def test_each_complaint():
    found = health.Health(**FIELDS)
    assert found.alive.tolist() == [True, True, False, True]
    assert found.status == {
        3: "kept",
        5: "low contrast",
        8: "collapsed",
        9: "near-copies, unlike what the classifier knows",
    }


def test_complaints_are_logged_by_client(caplog):
    with caplog.at_level(logging.WARNING):
        health.Health(**FIELDS).tell()
    assert [record.getMessage() for record in caplog.records] == [
        "generators of client 8: collapsed, left out",
        "generators of client 5: low contrast",
        "generators of client 9: near-copies",
        "generators of client 9: unlike what the classifier knows",
    ]


def test_networks_without_batch_norm_give_no_complaint():
    fields = FIELDS | {"moments": np.zeros(4), "nearest": np.ones(4)}
    assert health.Health(**fields).status[9] == "kept"


def test_nearest_by_hand():
    # On a line at 0, 1 and 3: nearest 1, 1, 2; mean square of 1, 2, 3.
    points = jnp.array([[0.0], [1.0], [3.0]])
    assert float(health.nearest(points)) == pytest.approx(1 / np.sqrt(14 / 3))
    assert float(health.nearest(jnp.ones((4, 2)))) == 0


def test_moments_are_those_of_the_classifier():
    network = tiny.classifier()
    model = tiny.varied(network, prng.named(prng.root(0), "model"))
    image = np.random.RandomState(0).uniform(-1, 1, (6, 16, 16, 1))

    class Gan:
        classifier = network

    _, moments = network.logits_and_moments(model, jnp.asarray(image))
    mean, usual = moments["bn"]["mean"], model.batch_stats["bn"]
    expected = np.mean(np.abs(mean - usual["mean"]) / np.sqrt(usual["var"] + 1e-5))
    found = health.moments_distance(Gan, model, jnp.asarray(image))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_without_a_living_generator_the_study_stops():
    with pytest.raises(errors.MosaicError, match="all have collapsed"):
        health.check_alive(Generators((), jnp.zeros(3, bool)), 0.05)
