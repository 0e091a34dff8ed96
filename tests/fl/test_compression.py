"""Compression: known answers, what is promised of errors, and bytes that are sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import compression, uploads
from mosaic_jax.fl.compression import COMPRESSORS, EightBits, Sign, TopK

every_compressor = pytest.mark.parametrize("name", COMPRESSORS)
ARRAY = jnp.array([0.5, -3.0, 0.0, 2.0, -0.25, 1.0, -1.0, 4.0, 0.125])


def read(compressor, array=ARRAY):
    message = compressor.encode(array, prng.root(3))
    return np.asarray(compressor.decode(message, len(array)))


def test_top_k_sends_the_largest():
    message = TopK(share=0.3).encode(ARRAY, prng.root(0))
    assert sorted(message["place"].tolist()) == [1, 3, 7]
    expected = np.where(np.isin(np.arange(9), [1, 3, 7]), ARRAY, 0)
    np.testing.assert_array_equal(read(TopK(share=0.3)), expected)


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.01, 9, 1), (0.5, 9, 5), (1.0, 9, 9), (0.07, 100, 7), (0.01, 1000, 10)],
)
def test_how_many_top_k_sends(share, size, count):
    array = jax.random.normal(prng.root(size), (size,))
    found = read(TopK(share=share), array)
    assert np.count_nonzero(found) == count
    left = np.abs(array)[found == 0]
    assert not left.size or left.max() <= np.abs(found[found != 0]).min()


@pytest.mark.parametrize(
    ("size", "kind"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_places_are_of_the_smallest_type_that_holds_them(size, kind):
    array = jnp.zeros(size).at[-1].set(1.0)
    message = TopK(share=1 / size).encode(array, prng.root(0))
    assert message["place"].dtype == kind
    assert read(TopK(share=1 / size), array)[-1] == 1.0


def test_sign_is_the_mean_magnitude():
    scale = np.abs(ARRAY).mean()
    np.testing.assert_allclose(
        read(Sign()), np.where(np.asarray(ARRAY) >= 0, scale, -scale), rtol=1e-6
    )


def test_eight_bits_are_near_and_right_on_average():
    """Within five deviations of the mean of many roundings, each less than a level."""
    level, count = 4 / 127, 4000
    keys = jax.vmap(lambda i: prng.at(prng.root(4), i))(jnp.arange(count))

    def one(key):
        compressor = EightBits()
        return compressor.decode(compressor.encode(ARRAY, key), 9)

    found = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    assert np.abs(found - np.asarray(ARRAY)).max() < level * 1.001
    assert found.std(axis=0).max() > level / 4
    bound = 5 * level / 2 / np.sqrt(count) + 1e-6
    np.testing.assert_allclose(found.mean(axis=0), ARRAY, atol=bound)


@every_compressor
def test_an_array_of_zeros_stays_so(name):
    np.testing.assert_array_equal(read(COMPRESSORS[name](), jnp.zeros(11)), 0)


UPLOAD = {
    "model": ModelState(
        {"kernel": jnp.arange(70.0).reshape(7, 10) - 30, "bias": jnp.arange(3.0)},
        {"mean": jnp.arange(5.0)},
    ),
    "counted": jnp.array(3.0),
    "steps": jnp.arange(2),
}
REST = 5 * 4 + 4 + 2 * 4
# Of the kernel and the bias; 7 of 70 values and 1 of 3, with a byte for each place.
SENT = {
    "top_k": (7 * 5 + 1 * 5, TopK(share=0.1)),
    "eight_bits": (70 + 4 + 3 + 4, EightBits()),
    "sign": (9 + 4 + 1 + 4, Sign()),
}


@every_compressor
def test_bytes_by_hand(name):
    """Each array by itself, and the rest as it is."""
    expected, compressor = SENT[name]
    message = compression.encode(compressor, UPLOAD, prng.root(0))
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(message)]
    assert sum(array.nbytes for array in arrays) == expected + REST


@every_compressor
def test_shapes_of_a_message_do_not_depend_on_values(name):
    """So that bytes can be counted before anything is sent."""
    compressor = COMPRESSORS[name]()

    def encode(upload):
        return compression.encode(compressor, upload, prng.root(0))

    shapes = jax.eval_shape(encode, UPLOAD)
    for factor in (0, 1, -2):
        upload = jax.tree.map(
            lambda leaf, by=factor: (by * leaf).astype(leaf.dtype), UPLOAD
        )
        message = encode(upload)
        assert trees.num_bytes(message) == trees.num_bytes(shapes)
        assert jax.tree.structure(message) == jax.tree.structure(shapes)


@every_compressor
def test_what_is_no_parameter_is_sent_as_it_is(name):
    compressor = COMPRESSORS[name]()
    message = compression.encode(compressor, UPLOAD, prng.root(0))
    found = compression.decode(compressor, message, UPLOAD)
    assert jax.tree.structure(found) == jax.tree.structure(UPLOAD)
    for a, b in (
        (found["model"].batch_stats, UPLOAD["model"].batch_stats),
        (found["counted"], UPLOAD["counted"]),
        (found["steps"], UPLOAD["steps"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    kernel = found["model"].params["kernel"]
    assert (kernel != UPLOAD["model"].params["kernel"]).any()


@pytest.mark.parametrize("compressor", [TopK(share=0.1), Sign()])
def test_with_feedback_nothing_is_lost_for_good(compressor):
    """The sum of what is read differs from that of the updates by the last error.

    Which stays bounded, where without feedback it grows with the number of rounds.
    """
    np_rng = np.random.RandomState(0)
    updates = jnp.asarray(np_rng.normal(0.3, 1, (400, 20)), jnp.float32)

    def round_of(error, update):
        wanted = update + error
        found = compressor.decode(compressor.encode(wanted, prng.root(0)), 20)
        return wanted - found, found

    error, found = jax.lax.scan(round_of, jnp.zeros(20), updates)
    total = updates.sum(0)
    np.testing.assert_allclose(found.sum(0) + error, total, rtol=1e-3, atol=1e-2)
    free = jax.vmap(lambda update: round_of(0.0, update)[1])(updates)
    lost = np.abs(total - free.sum(0)).max()
    assert np.abs(error).max() < lost / 2


def test_feedback_can_be_left_out():
    assert TopK().error_feedback and Sign().error_feedback
    assert not dataclasses.replace(Sign(), error_feedback=False).error_feedback
    assert not EightBits().error_feedback


def test_parameters_are_told_by_the_names_in_their_paths():
    model = ModelState(
        params={"batch_stats_head": jnp.zeros(2), "bias": jnp.ones(2)},
        batch_stats={"mean": jnp.zeros(3)},
    )
    assert [leaf.shape for leaf in uploads.parameters(model)] == [(2,), (2,)]
