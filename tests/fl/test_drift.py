"""Algorithms against the drift of clients: their known answers."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import trees
from mosaic_jax.core.types import Batch, ModelState
from mosaic_jax.fl import algorithms
from mosaic_jax.fl.algorithms import moon
from mosaic_jax.fl.training import Local
from tests import tiny
from tests.tiny import close

SIZES = [10, 19, 8]
# Steps so long that what an algorithm does to them shows.
LOCAL = dataclasses.replace(tiny.LOCAL, learning_rate=0.5)
ONE_STEP = dataclasses.replace(LOCAL, steps=1)


def run(algorithm, count=3, *, sizes=SIZES, **fields):
    """State after `count` rounds."""
    fields = {"data": tiny.dataset(sizes), "local": LOCAL} | fields
    return tiny.run_rounds(algorithm, count, **fields)[0]


def model_of(value):
    return ModelState({"w": jnp.array([value])}, {})


def test_scaffold_by_hand():
    algorithm = algorithms.Scaffold(server_learning_rate=0.5)
    local = Local(steps=4, learning_rate=0.25)
    turn = tiny.turn(model=model_of(1.0), state={"w": jnp.array([0.25])})
    turn = turn.replace(server={"w": jnp.array([1.5])}, local=local)
    seen = dataclasses.replace(tiny.seen(), turn=turn)
    correction = jax.grad(algorithm.penalty)(model_of(7.0).params, seen)
    np.testing.assert_allclose(correction["w"], [1.5 - 0.25])
    # c_i = 0.25 - 1.5 + (1 - 3) / (4 * 0.25)
    upload, control = algorithm.upload(turn, model_of(3.0), jnp.array(0.0))
    np.testing.assert_allclose(control["w"], [-3.25])
    np.testing.assert_allclose(upload["change"]["w"], [-3.25 - 0.25])
    np.testing.assert_allclose(upload["model"].params["w"], [3.0])
    # Half of the clients: c = 1.5 + 0.5 * -3.5, w = 1 + 0.5 * (3 - 1)
    state, model = algorithm.aggregate(turn.server, turn.model, upload, 0.5)
    np.testing.assert_allclose(state["w"], [-0.25])
    np.testing.assert_allclose(model.params["w"], [2.0])


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_of_one_client_is_sgd(option):
    scaffold = algorithms.Scaffold(option=option)
    found = run(scaffold, sizes=[19])
    assert np.abs(found.server["fc"]["kernel"]).max() > 1e-3
    close(found.model, run(algorithms.FedAvg(), sizes=[19]).model)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"clients_per_round": 2},
        {"local": dataclasses.replace(LOCAL, failures=0.5)},
    ],
)
def test_scaffolds_server_keeps_the_mean_of_the_clients_control_variates(fields):
    """Also where some take part, or uploads are lost, of clients of unlike sizes."""
    state = run(algorithms.Scaffold(), **fields)
    mean = jax.tree.map(lambda c: np.average(c, axis=0, weights=SIZES), state.client)
    close(state.server, mean)
    plain = run(algorithms.FedAvg()).model.params["fc"]["kernel"]
    assert np.abs(state.model.params["fc"]["kernel"] - plain).max() > 1e-4


@pytest.mark.slow
def test_scaffolds_options_agree_where_a_round_is_one_step():
    one, other = (
        run(algorithms.Scaffold(option=option), local=ONE_STEP)
        for option in ("I", "II")
    )
    close(one, other, rtol=1e-3)
    steps = run(algorithms.Scaffold(option="I"), 1).client["fc"]["kernel"]
    others = run(algorithms.Scaffold(option="II"), 1).client["fc"]["kernel"]
    assert np.abs(steps - others).max() > 1e-4


def moon_seen(features, received, last):
    """What MOON sees of images whose features are known for every model."""
    known = {"received": received, "last": last}
    classifier = types.SimpleNamespace(features=lambda model, image: known[model])
    turn = tiny.turn(model="received", state="last")
    mask = jnp.array([True] * (len(features) - 1) + [False])
    batch = Batch(image=None, label=None, mask=mask)
    seen = tiny.seen().replace(turn=turn, batch=batch, features=features)
    return dataclasses.replace(seen, classifier=classifier)


def test_moon_by_hand():
    """Cosines 1 and 0, then 0.6 and 0.8; what is no image does not count."""
    own = jnp.array([[2.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    received = jnp.array([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    last = jnp.array([[0.0, 5.0], [0.0, 2.0], [1.0, 1.0]])
    algorithm = algorithms.Moon(mu=2.0, temperature=0.5)
    found = algorithm.penalty({}, moon_seen(own, received, last))
    terms = [
        -np.log(np.exp(near / 0.5) / (np.exp(near / 0.5) + np.exp(far / 0.5)))
        for near, far in ((1.0, 0.0), (0.6, 0.8))
    ]
    np.testing.assert_allclose(found, 2.0 * np.mean(terms), rtol=1e-5)


def test_moons_cosines_of_zeros_are_0_with_finite_gradients():
    zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
    value, slope = jax.value_and_grad(lambda x: moon.cosine(x, one).sum())(zero)
    assert value == 0 and np.isfinite(slope).all()


def test_moon_without_its_contrast_is_fedavg():
    one, other = (
        run(algorithm).model
        for algorithm in (algorithms.Moon(mu=0.0), algorithms.FedAvg())
    )
    tiny.close(one, other)
    assert not tiny.are_close(run(algorithms.Moon(mu=5.0)).model, other)


def test_moon_keeps_the_clients_last_model():
    state = run(algorithms.Moon(mu=5.0), keep_models=True)
    jax.tree.map(np.testing.assert_array_equal, state.client, state.client_model)
    plain = run(algorithms.FedAvg()).model
    assert trees.digest(plain) != trees.digest(state.model)


def test_fednova_by_hand():
    """Two steps to -1 and six to -2, of three times as many images."""
    algorithm = algorithms.FedNova()
    turn = tiny.turn(model=model_of(1.0))
    sent = [
        algorithm.upload(turn.replace(done=jnp.array(steps)), model_of(end), None)[0]
        for steps, end in ((2, -1.0), (6, -2.0))
    ]
    mean = jax.tree.map(lambda a, b: (a + 3 * b) / 4, *sent)
    _, model = algorithm.aggregate({}, turn.model, mean, 1.0)
    # d = 2 / 2 and 3 / 6, whose mean is 5 / 8; tau = (2 + 3 * 6) / 4
    np.testing.assert_allclose(model.params["w"], [1 - 5 * 5 / 8])


def test_fednova_counts_the_gradients_of_momentum():
    local = Local(steps=2, optimizer="momentum", momentum=0.5)
    turn = tiny.turn(model=model_of(1.0)).replace(local=local)
    sent, _ = algorithms.FedNova().upload(turn, model_of(-4.0), None)
    np.testing.assert_allclose(sent["counted"], 2.5)
    np.testing.assert_allclose(sent["way"]["w"], [2.0])


def test_fednova_with_equal_steps_is_fedavg_and_else_is_not():
    one, other = (
        run(algorithm).model
        for algorithm in (algorithms.FedNova(), algorithms.FedAvg())
    )
    close(one, other)
    epochs = dataclasses.replace(LOCAL, epochs=1)
    one, other = (
        run(algorithm, local=epochs).model.params["fc"]["kernel"]
        for algorithm in (algorithms.FedNova(), algorithms.FedAvg())
    )
    assert np.abs(one - other).max() > 1e-3
