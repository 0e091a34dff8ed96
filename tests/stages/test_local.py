"""Clients' steps outside of rounds: each on its own minibatches, in their order."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.fl import parallel, training
from mosaic_jax.stages import local
from tests import tiny

KEY = prng.root(0)
SIZES = [5, 30, 12, 20, 1]
STEPS = np.array([9, 26, 0, 13, 4])
BATCH = {"key": KEY, "batch_size": 4, "augmentation": "crop_flip"}


def digest_of(state, batch):
    """Depends on every image, label and mask of a minibatch, and on their order."""
    seen = jnp.mean(batch.image * batch.mask[:, None, None, None]) + jnp.sum(
        batch.label * batch.mask * jnp.arange(1, 5)
    )
    return 0.7 * state + seen


@functools.cache
def one_by_one():
    """The digest of each client, one minibatch drawn after the other."""
    data = tiny.dataset(SIZES)

    @jax.jit
    def step(found, client, number):
        batch_at = training.client_batches(client, data.images, number, 1, **BATCH)
        return digest_of(found, batch_at(0))

    expected = []
    for client, count in enumerate(STEPS):
        one, found = trees.take(data.client, client), jnp.zeros(())
        for number in range(count):
            found = step(found, one, number)
        expected.append(float(found))
    return expected


@pytest.mark.parametrize(
    ("at_once", "num_devices"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
)
def test_every_client_goes_through_its_own_minibatches(at_once, num_devices):
    data = tiny.dataset(SIZES)
    axis = parallel.build(np.array(SIZES), at_once=at_once, num_devices=num_devices)
    context = types.SimpleNamespace(
        clients=axis.place(data),
        axis=axis,
        settings=tiny.study(log__every_steps=5),
        mechanism=None,
    )

    def step(state, number, batch, client, each, shared, key):
        return digest_of(state, batch), {"number": number.astype(jnp.float32)}

    state = axis.replicate(np.zeros(len(SIZES), np.float32))
    run = local.run_steps(context, "steps", step, state, STEPS, **BATCH)
    steps = run.send(None)
    window = jax.jit(steps.window)
    for first in range(0, steps.num_steps, steps.every):
        state, metrics = window(steps.args, state, first, steps.window_end(first))
        assert np.isfinite(metrics["number"])
    np.testing.assert_allclose(state, one_by_one(), rtol=1e-5)


def test_a_steps_number_is_that_of_each_client_but_for_lanes():
    data = tiny.dataset(SIZES)

    def layout(at_once, num_devices, every):
        axis = parallel.build(np.array(SIZES), at_once=at_once, num_devices=num_devices)
        context = types.SimpleNamespace(
            clients=axis.place(data),
            axis=axis,
            settings=tiny.study(log__every_steps=every),
            mechanism=None,
        )
        state = axis.replicate(np.zeros(len(SIZES), np.float32))
        run = local.run_steps(context, "steps", None, state, STEPS, **BATCH)
        return run.send(None).layout

    alike = [(1, 1, 5), (1, 1, 4), (1, 2, 5)]
    assert len({layout(*one) for one in alike}) == 1
    assert layout(2, 1, 5) == layout(2, 1, 4) != layout(1, 1, 5)
