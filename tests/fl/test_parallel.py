"""Clients over groups, lanes and devices: the same results whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.fl import parallel
from tests import tiny

LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4), (2, 4)]
SIZES = [5, 9, 2, 7, 1]
STEPS = np.array([4, 11, 0, 6, 3])


def layout(at_once, num_devices):
    return parallel.build(np.array(SIZES), at_once=at_once, num_devices=num_devices)


def first_labels(data):
    """Label of each client's first image, and the sum over clients of all labels."""

    def one(client, factor, offset, images):
        labels = images.label[client.index]
        mine = jnp.where(jnp.arange(len(labels)) < client.size, labels, 0)
        return labels[0] * factor + offset, jnp.sum(mine)

    def run(axis):
        placed = axis.place(data)
        factor = jnp.arange(1, len(SIZES) + 1)
        program = jax.jit(
            lambda placed, offset: axis.map_and_sum(
                one, placed.client, factor, shared=(offset,), placed=(placed.images,)
            )
        )
        return program(placed, jnp.asarray(100))

    return run


@pytest.mark.parametrize(("at_once", "num_devices"), LAYOUTS)
def test_every_client_reads_its_own_images(at_once, num_devices):
    data = tiny.dataset(SIZES)
    each, total = first_labels(data)(layout(at_once, num_devices))
    label = np.asarray(data.images.label)
    first = label[np.cumsum([0, *SIZES[:-1]])]
    np.testing.assert_array_equal(each, first * np.arange(1, 6) + 100)
    assert int(total) == label.sum()


@pytest.mark.parametrize("num_devices", [2, 4])
def test_a_device_holds_the_images_of_its_clients_only(num_devices):
    data = tiny.dataset(SIZES)
    axis = layout(1, num_devices)
    placed = axis.place(data)
    for row, shard in zip(
        axis.slots, placed.images.label.addressable_shards, strict=True
    ):
        held = sum(SIZES[i] for i in row if i >= 0)
        longest = max(sum(SIZES[i] for i in r if i >= 0) for r in axis.slots)
        assert held <= len(shard.data) == longest < sum(SIZES)


@pytest.mark.parametrize(("at_once", "num_devices"), [(1, 1), (2, 2), (1, 4)])
def test_images_of_some_clients_alone(at_once, num_devices):
    """In host memory all, on the devices those of the clients whose turn it is."""
    data, rows = jax.tree.map(np.asarray, tiny.dataset(SIZES)), np.array([3, 0, 4])
    first = np.cumsum([0, *SIZES[:-1]])[rows]
    axis = layout(at_once, num_devices).of(len(rows))
    found = axis.gather(data, rows)
    width = data.client.index.shape[1]
    assert found.images.image.shape == (axis.slots.size * width, 16, 16, 1)
    assert len(found.images.label.addressable_shards) == num_devices
    np.testing.assert_array_equal(found.client.number, rows)

    def of_client(client, images):
        return images.image[client.index], images.label[client.index]

    image, label = jax.jit(
        lambda found: axis.map(of_client, found.client, placed=(found.images,))
    )(found)
    for i, (start, row) in enumerate(zip(first, rows, strict=True)):
        own = slice(start, start + SIZES[row])
        held = slice(0, SIZES[row])
        np.testing.assert_array_equal(image[i, held], data.images.image[own])
        np.testing.assert_array_equal(label[i, held], data.images.label[own])


@pytest.mark.parametrize(("at_once", "num_devices"), LAYOUTS)
def test_unequal_steps(at_once, num_devices):
    axis, every = layout(at_once, num_devices), 4
    plan = axis.plan(STEPS, every)

    def steps(state, first, count, gain):
        # Depends on the order of the steps, as training does.
        state, done = state
        state = jax.lax.fori_loop(
            0, count, lambda j, state: state * gain + first + j, state
        )
        return state, done + count

    run = jax.jit(
        lambda state, pieces: axis.advance(
            steps, state, jnp.full(len(SIZES), 0.5), pieces=pieces
        )
    )
    start = np.ones(len(SIZES), np.float32), np.zeros(len(SIZES), np.int32)
    state = axis.replicate(start)
    for first in range(0, plan.length, every):
        end = min(first + every, plan.length)
        state = run(state, plan.pieces(first, end))
    expected = np.ones(len(SIZES))
    for i, count in enumerate(STEPS):
        for number in range(count):
            expected[i] = expected[i] * 0.5 + number
    np.testing.assert_allclose(state[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(state[1], STEPS)
    assert run._cache_size() == 1


def test_sums_leave_out_what_fills_up_a_group():
    axis = layout(4, 1)
    each, total = jax.jit(
        lambda x: axis.map_and_sum(lambda x: (x, jnp.where(x == 0, jnp.nan, x)), x)
    )(jnp.arange(1.0, 6.0))
    np.testing.assert_array_equal(each, np.arange(1, 6))
    assert float(total) == 15


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_experts_some_at_once(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jnp.arange(37.0)  # not a multiple of what runs at once
    np.testing.assert_array_equal(parallel.expert_map(lambda x: 2 * x, x), 2 * x)


def test_too_many_devices():
    message = r"compute.devices = 9: must be <= 4, the devices there are"
    with pytest.raises(errors.ConfigError, match=message):
        parallel.build(np.ones(3), num_devices=9)
