"""Planted images: who trains on them, what they change, and what they must not."""

import dataclasses

import numpy as np
import pytest

from mosaic_jax.data import canaries, federated
from mosaic_jax.run import study
from tests import tiny

COUNT = 40


@pytest.fixture(scope="module")
def both():
    """A study's data without and with canaries."""
    settings = tiny.study()
    data = federated.load(settings.data, settings.seed)
    drawn = canaries.draw(COUNT, len(data.parts), data.info.image_shape, 10, seed=0)
    return data, federated.planted(data, drawn)


def test_each_client_trains_on_its_heads_alone(both):
    data, planted = both
    drawn, clients = planted.canaries, planted.clients
    first = len(data.clients.images.label)
    np.testing.assert_array_equal(
        clients.images.image[:first], data.clients.images.image
    )
    for i, part in enumerate(planted.parts):
        own = len(data.parts[i])
        np.testing.assert_array_equal(part[:own], data.parts[i])
        numbers = first + i * COUNT + np.flatnonzero(drawn.inside[i])
        np.testing.assert_array_equal(part[own:], numbers)
        assert clients.client.size[i] == len(part)
        np.testing.assert_array_equal(clients.client.index[i, : len(part)], part)
        np.testing.assert_array_equal(
            clients.images.image[part[own:]], drawn.image[i][drawn.inside[i]]
        )
        count = np.bincount(clients.images.label[part], minlength=10)
        np.testing.assert_array_equal(planted.label_count[i], count)
        np.testing.assert_array_equal(clients.client.label_count[i], count)


def test_nothing_that_is_measured_by_is_touched(both):
    data, planted = both
    assert planted.held_out is data.held_out
    np.testing.assert_array_equal(planted.test_index, data.test_index)


def test_coins_are_fair_and_images_unlike(both):
    drawn = both[1].canaries
    assert 0.3 < drawn.inside.mean() < 0.7
    flat = drawn.image.reshape(-1, *drawn.image.shape[2:])
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert set(drawn.label.reshape(-1)) == set(range(10))


def test_coins_and_images_count(both):
    data, planted = both
    seen = {data.content_sha256, planted.content_sha256}
    drawn = planted.canaries
    turned = dataclasses.replace(drawn, inside=~drawn.inside)
    other = dataclasses.replace(drawn, image=255 - drawn.image)
    seen |= {federated.planted(data, one).content_sha256 for one in (turned, other)}
    assert len(seen) == 4
    # They are planted once.
    assert federated.planted(planted, other) is planted


def test_another_seed_has_as_many_images_of_other_coins():
    found = [
        study.build(tiny.study(leakage__images=4, leakage__canaries=6, seed=seed)).data
        for seed in (0, 1)
    ]
    shapes = {data.clients.images.image.shape for data in found}
    assert len(shapes) == 1
    assert not np.array_equal(*(data.canaries.inside for data in found))
