"""Images that are read from files: a set as in memory, of which few are there."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from mosaic_jax.core import errors, trees
from mosaic_jax.data import federated, prepared, sources
from mosaic_jax.data.dataset import Arrays, describe
from mosaic_jax.data.stored import StoredImages
from tests import tiny
from tests.prepared import prepare

IMAGE = np.random.RandomState(0).randint(0, 256, (50, 6, 4, 1)).astype(np.uint8)


def stored(image, calls=None):
    """`image` as if it lay in files; `calls` gets the numbers that are read."""

    def read(number):
        assert np.all(np.diff(number) > 0)
        if calls is not None:
            calls.append(number.tolist())
        return image[number]

    return StoredImages(read, np.arange(len(image)), image.shape[1:])


def test_it_is_like_an_array():
    calls = []
    images = stored(IMAGE, calls)
    assert (images.shape, images.dtype, len(images)) == (IMAGE.shape, np.uint8, 50)
    rows = np.array([7, 3, 7, 0])
    for index in (3, -1, slice(2, 9, 3), slice(60, 70), rows, rows.reshape(2, 2)):
        np.testing.assert_array_equal(images[index], IMAGE[index])
    assert calls[4] == [0, 3, 7]  # each once, in the order of the files
    np.testing.assert_array_equal(np.asarray(images), IMAGE)
    some = images.select(np.array([4, 2])).select(np.array([1]))
    np.testing.assert_array_equal(some[0], IMAGE[2])


def test_digests_go_by_blocks(monkeypatch):
    monkeypatch.setattr("mosaic_jax.data.stored._BLOCK", 7 * 6 * 4)
    calls = []
    assert trees.digest({"x": stored(IMAGE, calls)}) == trees.digest({"x": IMAGE})
    assert max(map(len, calls)) == 7
    other = IMAGE.copy()
    other[49, 0, 0, 0] += 1
    assert trees.digest(stored(other)) != trees.digest(stored(IMAGE))


CONFIG = dataclasses.replace(
    tiny.study().data, split="iid", num_clients=4, validation=0.2, max_images=40
)


def peak(call):
    tracemalloc.start()
    result = call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, result


@pytest.mark.parametrize("count", [2000, 8000])
def test_a_study_never_holds_all_images(count, monkeypatch):
    """Neither to measure and to split them nor to take their digest."""
    monkeypatch.setattr("mosaic_jax.data.stored._BLOCK", 1 << 18)
    monkeypatch.setattr("mosaic_jax.data.dataset._CHUNK_NUMBERS", 1 << 18)
    label, shape = np.arange(count) % 3, (32, 32, 3)
    test = np.zeros((50, *shape), np.uint8), label[:50]

    def read(number):  # made here: nothing else holds them
        return np.broadcast_to(number[:, None, None, None] % 251, (len(number), *shape))

    def built(image):
        arrays = Arrays(image, label, *test)
        config = dataclasses.replace(CONFIG, max_images=0, validation=0.0)
        return federated.build(config, 0, describe(arrays), arrays).content_sha256

    images = StoredImages(lambda n: read(n).astype(np.uint8), np.arange(count), shape)
    used, found = peak(lambda: built(images))
    size = count * 32 * 32 * 3
    assert used < (0.3 if count == 2000 else 0.1) * size
    assert found == built(np.asarray(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets as TFDS prepares them: images of one shape, and of several."""
    directory = tmp_path_factory.mktemp("tfds")
    prepare(directory, "Alike", side=16)
    prepare(directory, "Unlike")
    return directory


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["alike", "unlike"])
def test_a_prepared_set_is_the_same_in_memory_and_in_files(folder, name):
    config = dataclasses.replace(
        CONFIG,
        name=f"tfds:{name}",
        dir=str(folder),
        column="writer",
        split="by_column",
        max_images=140,
    )
    whole = federated.load(config, 0)
    found = federated.load(dataclasses.replace(config, in_memory=False), 0)
    assert found.content_sha256 == whole.content_sha256
    assert found.info == whole.info
    image = found.clients.images.image
    assert isinstance(image, StoredImages)
    rows = np.array([100, 3, 99, 3])
    np.testing.assert_array_equal(image[rows], whole.clients.images.image[rows])
    np.testing.assert_array_equal(
        found.held_out["validation"].image, whole.held_out["validation"].image
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_stay_in_files(folder, monkeypatch):
    told = r"must be True for data.size = \(32, 32\), .* or data.size must be \(16, 16"
    with pytest.raises(errors.DataError, match=told):
        sources.load("tfds:alike", folder, size=(32, 32), in_memory=False)
    sources.load("tfds:unlike", folder, size=(32, 32), in_memory=False)
    monkeypatch.setattr(prepared._Prepared, "file_format", "tfrecord")
    told = "must be True for data.name = 'tfds:alike', which is prepared as tfrecord"
    with pytest.raises(errors.DataError, match=told):
        sources.load("tfds:alike", folder, in_memory=False)
    for fields, told in (
        ({}, "data.in_memory = False: must be True for data.name = 'digits'"),
        (
            {"data__name": "tfds:x", "data__shift": "rotate"},
            "data.shift = 'rotate': must be 'none' for data.in_memory = False",
        ),
    ):
        with pytest.raises(errors.ConfigError, match=told):
            tiny.study(data__in_memory=False, **fields)
