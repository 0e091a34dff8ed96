"""Images that look different at each client."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from mosaic_jax.core import errors
from mosaic_jax.data import federated, shifts
from mosaic_jax.data.dataset import Arrays, Info
from tests import tiny

NUM_CLIENTS = 4


def images(num=8, channels=1):
    np_rng = np.random.RandomState(0)
    return np_rng.randint(0, 256, (num, 16, 16, channels)).astype(np.uint8)


def shifted(name, image, strength=1.0, seed=0):
    owner = np.repeat(np.arange(NUM_CLIENTS), len(image) // NUM_CLIENTS)
    fields = {"num_clients": NUM_CLIENTS, "strength": strength, "seed": seed}
    return shifts.of_clients(image, owner, name=name, **fields)


@pytest.mark.parametrize("name", shifts.SHIFTS)
def test_by_degrees_from_none(name):
    image = np.full((8 * 100, 16, 16, 3), 128, np.uint8)
    if name == "rotate":
        image[:, :4] = 0
    away = np.abs(shifted(name, image, 0.2).astype(int) - image)
    away = away.reshape(NUM_CLIENTS, -1).mean(1)
    assert away[0] == 0 and (away[1:] > 0).all()
    if name != "colour":  # which draws how much of the degree
        assert (np.diff(away) > 0).all()
    np.testing.assert_array_equal(shifted(name, image, 0.0), image)


def test_four_clients_have_the_four_turns():
    image = images()
    found = shifted("rotate", image).reshape(NUM_CLIENTS, 2, 16, 16, 1)
    for i in range(NUM_CLIENTS):
        expected = np.rot90(image[2 * i : 2 * i + 2], i, axes=(1, 2))
        np.testing.assert_array_equal(found[i], expected)


def test_turns_by_other_angles_lie_between():
    image = np.zeros((1, 16, 16, 1), np.uint8)
    image[0, 6:10, 11:15] = 255  # on the right; it goes up
    centres = []
    for degree in (0, 0.06, 0.12, 0.19, 0.25):
        found = shifts.rotate(image, degree, np.random.RandomState(0))[0, ..., 0]
        row, column = ndimage.center_of_mass(found)
        centres.append(np.degrees(np.arctan2(7.5 - row, column - 7.5)) / 360)
    np.testing.assert_allclose(centres, (0, 0.06, 0.12, 0.19, 0.25), atol=0.01)


def test_noise_has_the_deviation_of_its_degree():
    image = np.full((100, 16, 16, 1), 128, np.uint8)
    found = shifted("noise", image, 0.4).reshape(NUM_CLIENTS, -1) / 255
    np.testing.assert_allclose(found.std(1), [0, 0.1, 0.2, 0.3], rtol=0.1, atol=1e-9)
    # Each image has noise of its own.
    assert len(np.unique(found[3].reshape(25, -1), axis=0)) == 25


def test_colours_are_one_for_a_client_and_never_brighter():
    image = np.full((8, 16, 16, 3), 200, np.uint8)
    found = shifted("colour", image, 0.5)
    assert (found <= image).all() and (found >= image * 0.5).all()
    for i in range(NUM_CLIENTS):
        mine = found[2 * i : 2 * i + 2].reshape(-1, 3)
        assert len(np.unique(mine, axis=0)) == 1
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == NUM_CLIENTS
    assert (shifted("colour", image, 0.5, seed=1) != found).any()


def study_of(image, label, **fields):
    config = dataclasses.replace(
        tiny.study().data, split="iid", num_clients=3, **fields
    )
    info = Info(2, 16, 1, (0.5,), (0.5,), "none")
    return federated.build(config, 0, info, Arrays(image, label, image, label))


def test_test_images_are_shifted_as_those_of_the_client_that_they_are_dealt_to():
    image, label = np.full((10, 16, 16, 1), 200, np.uint8), np.arange(10) % 2
    plain = study_of(image, label, validation=0.3)
    found = study_of(image, label, validation=0.3, shift="colour")
    assert found.sha256 == plain.sha256
    assert found.content_sha256 != plain.content_sha256
    client = [np.unique(found.clients.images.image[part]) for part in found.parts]
    assert [len(one) for one in client] == [1, 1, 1] and len(np.unique(client)) == 3
    test = found.held_out["test"].image
    for one, index in zip(client, found.test_index, strict=True):
        assert np.unique(test[index]) == one
    # The tenth, and validation images, are dealt in turn.
    for name in ("test", "validation"):
        image = found.held_out[name].image
        assert set(np.unique(image)) <= set(np.unique(client))
    assert len(np.unique(found.held_out["validation"].image)) == 3


def test_a_strength_of_none_changes_nothing():
    image, label = images(10), np.arange(10) % 2
    plain, found = (
        study_of(image, label, shift=name, shift_strength=0.0)
        for name in ("none", "rotate")
    )
    assert found.content_sha256 == plain.content_sha256


def upside_down(image, degree, np_rng):
    """A shift of a user's own."""
    del np_rng
    return image[:, ::-1] if degree > 0.3 else image


def wrong(image, degree, np_rng):
    """One that forgets its type."""
    del np_rng
    return image * degree


def broken(image, degree, np_rng):
    """One that fails."""
    raise KeyError("x")


def test_a_shift_of_ones_own():
    image = images()
    found = shifted(f"{__name__}:upside_down", image)
    np.testing.assert_array_equal(found[:4], image[:4])
    np.testing.assert_array_equal(found[4:], image[4:, ::-1])


@pytest.mark.parametrize(
    ("name", "told"),
    [("wrong", "must be uint8 of shape"), ("broken", "KeyError: 'x'")],
)
def test_a_shift_of_ones_own_that_fails(name, told):
    with pytest.raises(errors.DataError, match=f"data.shift = '.*:{name}'.*{told}"):
        shifted(f"{__name__}:{name}", images())


def test_clients_that_share_test_images_have_no_shift():
    told = "data.client_test = 'own': must be 'even' for data.shift = 'noise'"
    with pytest.raises(errors.ConfigError, match=told):
        tiny.study(data__shift="noise", data__client_test="own")
