"""A client stops training its generator, and sends the one that came nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.run import runner
from mosaic_jax.stages import local, patience
from tests import running, tiny

PATIENCE = 2


def test_moments_leave_out_what_is_masked():
    features = jax.random.normal(tiny.KEY, (5, 3))
    found = patience.moments(features, jnp.array([True, True, False, True, False]))
    kept = np.asarray(features)[[0, 1, 3]]
    np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, kept.std(axis=0), rtol=1e-5)


def test_distance_of_normal_distributions():
    def normal(mean, deviation):
        return patience.Moments(jnp.array(mean), jnp.array(deviation))

    found = patience.distance(
        normal([0.0, 1.0], [1.0, 2.0]), normal([2.0, 1.0], [1.0, 5])
    )
    assert found == 4 + 9
    assert patience.distance(*2 * (normal([3.0], [0.5]),)) == 0


def walk(distances):
    """State, best and metrics after each step; the generator is the step's number."""

    def train(state):
        return state + 1, {"loss": jnp.float32(10)}

    def look(state, best):
        found = jnp.array(distances)[jnp.int32(state) - 1]
        return patience.look(best, state, found)

    @jax.jit
    def step(state, best, number):
        due = number % 2 == 1
        return patience.step(train, look, state, best, due, PATIENCE)

    state, best = jnp.float32(0), patience.start(jnp.float32(0))
    result = []
    for number in range(len(distances)):
        state, best, metrics = step(state, best, number)
        result.append((state, best, metrics))
    return result


def test_the_nearest_is_kept_and_training_stops():
    # Looks follow the steps 2, 4, 6, ...: what lies between them is never seen.
    result = walk([0.0, 5.0, 0.0, 3.0, 0.0, 4.0, 0.0, 3.5, 0.0, 1.0])
    states, bests, metrics = zip(*result, strict=True)
    assert [float(state) for state in states] == [*range(1, 9), 8, 8]
    assert [float(best.model) for best in bests] == [0, 2, 2, *7 * [4]]
    assert [int(best.idle) for best in bests] == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert bests[-1].steps == 8 and bests[-1].distance == 3
    assert [float(one["loss"]) for one in metrics] == [*8 * [10], 0, 0]
    assert [float(one[local.ACTIVE]) for one in metrics] == [*8 * [1], 0, 0]


def test_clients_stop_each_by_itself():
    def look(state, best):
        # The second client's generator comes nearer with every step.
        return patience.look(best, state["step"], -state["step"] * state["gains"])

    def one(state, best):
        def trained(state):
            return state | {"step": state["step"] + 1}, {}

        return patience.step(trained, look, state, best, jnp.array(True), PATIENCE)

    state = {"step": jnp.zeros(2), "gains": jnp.array([0.0, 1.0])}
    best = jax.vmap(patience.start)(jnp.zeros(2))
    for _ in range(6):
        state, best, _ = jax.vmap(one)(state, best)
    np.testing.assert_array_equal(best.steps, [3, 6])
    np.testing.assert_array_equal(state["step"], [3, 6])
    np.testing.assert_array_equal(best.model, [1, 6])


@pytest.mark.slow
def test_a_client_sends_a_generator_that_it_looked_at(tmp_path):
    """Also where training is shorter than the way to the first look."""

    def sent(**fields):
        fields = {"epochs": 0, "steps": 5} | fields
        study = tiny.study(
            compat__fresh_classifier=True,
            **{f"generators__{name}": value for name, value in fields.items()},
        )
        work = runner.Experiment(study, tmp_path)
        found = running.drive(work.start(running.link_of(work, "generators"), {}))
        return found.artifacts["client_generators"].model, found.results["steps"]

    last, steps = sent(patience=1, look_every=100)
    assert steps == [5, 5, 5]
    tiny.close(last.params, sent()[0].params, 1e-5)
    _, steps = sent(patience=1, look_every=1)
    assert min(steps) >= 2 and sum(steps) < 15  # a first look cannot be the last
