"""Arithmetic on trees."""

import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import trees


def test_running_mean_weights_entries_by_their_age():
    entries = jnp.array([3.0, -1.0, 4.0, 1.0])
    mean = {"x": jnp.array(100.0)}
    for number, new in enumerate(entries):
        mean = trees.running_mean(mean, {"x": new}, 0.5, jnp.array(number))
    weight = np.array([1, 2, 4, 8]) / 15
    np.testing.assert_allclose(mean["x"], weight @ np.asarray(entries), rtol=1e-6)
