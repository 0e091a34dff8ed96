"""Training that is no longer finite stops, says where and who, and is not averaged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT, DIVERGED_STEP, Repeated
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.holdings import WholeNetwork
from mosaic_jax.fl.local_sgd import LocalSGD
from mosaic_jax.run import checkpoint, runner
from tests import tiny


class PoisonedSGD(LocalSGD):
    """In round 3 the model of client 1 gets one parameter that is no number."""

    def final(self, turn, carry, loss):
        hit = (turn.client.number == 1) & (turn.number == 3)
        params = jax.tree.map(
            lambda leaf: leaf.at[(0,) * leaf.ndim].add(jnp.where(hit, jnp.nan, 0)),
            carry[0].params,
        )
        return super().final(turn, (carry[0].replace(params=params), carry[1]), loss)


class PoisonedNetwork(WholeNetwork):
    def program(self, rate, local):
        return PoisonedSGD(self.classifier, self.algorithm, local)


@dataclasses.dataclass(frozen=True)
class Poisoned(Algorithm):
    """FedAvg, but for `PoisonedSGD`."""

    def holdings(self, classifier, num_clients, rates):
        return PoisonedNetwork(classifier, self, num_clients)


@pytest.mark.parametrize("client_state", ["device", "host"])
def test_one_client_in_one_round_is_named(tmp_path, client_state):
    study = runner.Experiment(
        tiny.study(
            method="federated",
            init__method="tests.faults.test_divergence:Poisoned",
            init__rounds=8,
            compute__client_state=client_state,
            evaluation__every=2,
        ),
        tmp_path,
    )
    # Rounds count from 1.
    expected = "seed 0, init, in round 4: client 1: loss is not finite: lower the"
    with pytest.raises(errors.DivergedError, match=expected):
        study.run()
    # What was saved is from before.
    (folder,) = (tmp_path / "stages" / "init").glob("*/checkpoints/round")
    step, flat, _ = checkpoint.Checkpoints(folder).latest()
    assert step == 2
    assert all(np.isfinite(leaf).all() for leaf in flat.values())
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "diverged" not in text


SHORT = {
    "data__num_clients": 2,
    "init__rounds": 1,
    "warmup__rounds": 0,
    "finetune__rounds": 0,
    "evaluation__every": 1,
    "experts__local_steps": 0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    runner.Experiment(tiny.study(**SHORT), workdir).run()
    return workdir


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"generators__learning_rate": 1e38},
            r"generators, by gan \d: client \d: \w+ is not finite",
            marks=pytest.mark.slow,
        ),
        ({"meta__learning_rate": 1e38}, r"meta, in head \d: \w+ is not finite"),
        ({"distill__learning_rate": 1e38}, r"distill, in student \d: \w+ is not fin"),
    ],
)
@pytest.mark.slow
def test_every_loop_is_watched(finished, tmp_path, changes, expected):
    study = runner.Experiment(
        tiny.study(**SHORT | changes), tmp_path, reuse_from=[finished]
    )
    with pytest.raises(errors.DivergedError, match=expected):
        study.run()


def repeat(step, state, first, end):
    """State and metrics after the steps of a window."""
    work = Repeated(step)
    state, _, metrics = work.run((), state, work.empty((), state), first, end)
    return state, metrics


def test_the_step_is_the_first_that_is_not_finite():
    def step(args, state, number):
        state = state + jnp.where(number == 5, jnp.inf, 1.0)
        return state, {"loss": state}

    _, metrics = repeat(step, jnp.zeros(()), 0, 10)
    assert int(metrics[DIVERGED_STEP]) == 5
    _, metrics = repeat(step, jnp.zeros(()), 0, 5)
    assert int(metrics[DIVERGED_STEP]) == -1
    assert float(metrics["loss"]) == np.mean([1, 2, 3, 4, 5])


def test_a_client_that_a_step_names_is_enough():
    def step(args, state, number):
        client = jnp.where(number >= 3, number + 4, -1)
        return state, {DIVERGED_CLIENT: client}

    _, metrics = repeat(step, jnp.zeros(()), 0, 6)
    assert (int(metrics[DIVERGED_STEP]), int(metrics[DIVERGED_CLIENT])) == (3, 7)


def test_a_state_that_no_metric_shows_is_seen_at_the_end_of_the_part():
    def step(args, state, number):
        return state * jnp.where(number == 2, jnp.nan, 1.0), {"loss": jnp.zeros(())}

    _, metrics = repeat(step, jnp.ones(()), 0, 6)
    assert int(metrics[DIVERGED_STEP]) == 5


def test_a_loop_may_have_no_metrics():
    state, metrics = repeat(lambda args, state, step: (state + step, {}), 1, 0, 4)
    assert state == 7
    assert {int(metrics.pop(name)) for name in (DIVERGED_STEP, DIVERGED_CLIENT)} == {-1}
    assert not metrics


def test_sums_skip_no_one_silently():
    """A weight of 0 hides a client; a weight above 0 shows what is not finite."""
    tree = {"w": jnp.array([1.0, jnp.nan])}
    assert float(trees.weighted_mean(tree, jnp.array([1.0, 0.0]))["w"]) == 1.0
    assert np.isnan(trees.weighted_mean(tree, jnp.array([1.0, 1.0]))["w"])
