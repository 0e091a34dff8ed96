"""Optimisers on the server: steps worked out by hand, and against optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import prng
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import algorithms
from tests import tiny
from tests.tiny import KEY, close

SIZES = [10, 19, 8]
run = functools.partial(tiny.run_rounds, data=tiny.dataset(SIZES))


def two_rounds(algorithm, changes=(0.5, -1.0)):
    """The parameter after each round in which the mean model is that much larger."""
    model, found = ModelState({"w": jnp.array([1.0])}, {}), []
    state = algorithm.init_server(model)
    for change in changes:
        mean = ModelState({"w": model.params["w"] + change}, {})
        state, model = algorithm.aggregate(state, model, mean, 1.0)
        found.append(float(model.params["w"][0]))
    return found


def test_fedavgm_by_hand():
    found = two_rounds(algorithms.FedAvgM(server_learning_rate=0.5, momentum=0.8))
    # v = 0.5, then 0.8 * 0.5 - 1
    np.testing.assert_allclose(found, [1.25, 1.25 - 0.5 * 0.6])


def test_fedadagrad_by_hand():
    tau = 0.1
    found = two_rounds(algorithms.FedAdagrad(server_learning_rate=0.5, tau=tau))
    first = 1 + 0.5 * 0.5 / np.sqrt(0.25 + 2 * tau**2)
    second = first - 0.5 / np.sqrt(1.25 + 2 * tau**2)
    np.testing.assert_allclose(found, [first, second], rtol=1e-6)


def test_fedadam_by_hand():
    tau = 0.1
    algorithm = algorithms.FedAdam(
        server_learning_rate=0.5, tau=tau, beta_1=0.5, beta_2=0.8
    )
    first = 1 + 0.5 * 0.5 / (0.5 + tau)
    mean = (0.5 * 0.25 + 0.5 * -1.0) / (1 - 0.5**2)
    square = (0.8 * 0.2 * 0.25 + 0.2 * 1.0) / (1 - 0.8**2)
    second = first + 0.5 * mean / (np.sqrt(square) + tau)
    np.testing.assert_allclose(two_rounds(algorithm), [first, second], rtol=1e-6)


def test_fedyogi_by_hand():
    """Where v is larger than g^2 it falls by as much as it would rise otherwise."""
    algorithm = algorithms.FedYogi(
        server_learning_rate=0.5, tau=0.1, beta_1=0.0, beta_2=0.8
    )
    high, low = 0.2 * 1.0, 0.2 * 1.0 - 0.2 * 0.01  # after changes of 1 and of 0.1
    first = 1 + 0.5 / (np.sqrt(high / 0.2) + 0.1)
    second = first + 0.5 * 0.1 / (np.sqrt(low / (1 - 0.8**2)) + 0.1)
    found = two_rounds(algorithm, changes=(1.0, 0.1))
    np.testing.assert_allclose(found, [first, second], rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "tx"),
    [
        (algorithms.FedAdam(tau=1e-3), optax.adam(0.01, 0.9, 0.99, eps=1e-3)),
        (algorithms.FedYogi(tau=1e-3), optax.yogi(0.01, 0.9, 0.99, eps=1e-3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_optax_on_the_pseudo_gradient(algorithm, tx):
    model = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
    params = model.params
    mean = run(algorithms.FedAvg(), 1)[0].model
    slope = jax.tree.map(jnp.subtract, params, mean.params)
    change, _ = tx.update(slope, tx.init(params))
    found = run(algorithm, 1)[0].model
    close(found.params, optax.apply_updates(params, change))
    close(found.batch_stats, mean.batch_stats)


def test_without_momentum_is_fedavg():
    one = run(algorithms.FedAvgM(momentum=0.0))[0].model
    close(one, run(algorithms.FedAvg())[0].model)
