"""Federated algorithms: their known answers, and rounds of some of the clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, registry, trees
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.nn import losses, norm, resnet
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages import host_rounds
from tests import tiny
from tests.tiny import KEY, close

SIZES = [10, 19, 8]
FEDRS = {"mode": "binary", "growth": 0.0, "cap": 1.0}


class WithoutBatchNorm(tiny.Net):
    """The same network normalised by groups."""

    def setup(self):
        self.conv = resnet.conv(4, 3, 2)
        self.bn = norm.GroupNorm(2)
        self.fc = resnet.Linear(self.num_classes)


def run(algorithm, count=2, *, sizes=SIZES, data=None, **fields):
    """State after `count` rounds, and the losses of the last."""
    data = data or tiny.dataset(sizes)
    return tiny.run_rounds(algorithm, count, data=data, **fields)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def fedavg():
    return run(algorithms.FedAvg())[0].model


@pytest.mark.parametrize(
    "algorithm",
    [
        algorithms.FedProx(mu=0.0),
        algorithms.FedRS(alpha=1.0, **FEDRS),
        algorithms.FedRS(alpha=1.0, **FEDRS | {"mode": "graded"}),
        algorithms.FedLC(tau=0.0),
    ],
)
def test_is_fedavg_bit_for_bit(algorithm, fedavg):
    same(run(algorithm)[0].model, fedavg)


def test_fedbn_without_batch_norm_is_fedavg_bit_for_bit():
    classifier = Classifier(WithoutBatchNorm(4), (0.4,), (0.3,))
    one, other = (
        run(algorithm, network=classifier)[0].model
        for algorithm in (algorithms.FedBN(), algorithms.FedAvg())
    )
    same(one, other)


def test_fedprox_penalty_by_hand():
    old, new = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}
    seen = tiny.seen(model=ModelState(old, {}))
    penalty = functools.partial(algorithms.FedProx(mu=0.01).penalty, seen=seen)
    value, gradient = jax.value_and_grad(penalty)(new)
    assert value == pytest.approx(0.025)
    np.testing.assert_allclose(gradient["w"], [0.01, 0.02])


def test_fedprox_stays_nearer():
    def moved(mu):
        data = tiny.dataset(SIZES)
        before = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
        after = run(algorithms.FedProx(mu=mu), 1, data=data, keep_models=True)[0]
        distance = jax.tree.map(
            lambda new, old: jnp.sum((new - old) ** 2),
            trees.take(after.client_model.params, 0),
            before.params,
        )
        return sum(jax.tree.leaves(distance))

    assert moved(0.0) > moved(1.0) > moved(10.0) > 0


def test_fedbn_keeps_batch_norm_with_its_client():
    state, _ = run(algorithms.FedBN(), keep_models=True)
    kept = {
        f"bn/{name}": state.client_model.params["bn"][name]
        for name in ("scale", "bias")
    }
    same(state.client["params"], kept)
    same(state.client["batch_stats"], state.client_model.batch_stats)
    received = algorithms.FedBN().receive(state.model, trees.take(state.client, 1))
    same(received.params["bn"], trees.take(state.client_model.params["bn"], 1))
    same(received.params["conv"], state.model.params["conv"])
    scales = state.client["params"]["bn/scale"]
    assert not np.allclose(scales[0], scales[1])


def test_fedbn_finds_every_batch_norm_of_resnet18():
    classifier = Classifier(resnet.ResNet(10, width=2), (0.5,), (0.2,))
    model = jax.eval_shape(lambda: classifier.init(KEY, (16, 16, 1)))
    state = algorithms.FedBN().init_client(model)
    assert len(state["params"]) == 20 * 2
    assert len(jax.tree.leaves(state["batch_stats"])) == 20 * 2


def test_fedrs_by_hand():
    logits, label = jnp.array([[2.0, 1.0, -1.0]]), jnp.array([0])
    for count, alpha, mode, expected in (
        ((8, 4, 2), 0.5, "binary", 0.349012),
        ((8, 0, 0), 0.5, "binary", 0.266368),
        ((8, 0, 0), 0.0, "binary", 0.239545),
    ):
        algorithm = algorithms.FedRS(alpha=alpha, **FEDRS | {"mode": mode})
        scaled = algorithm.logits(logits, tiny.seen(label_count=jnp.array(count)))
        loss = losses.cross_entropy(scaled, label)
        assert loss == pytest.approx(expected, abs=1e-6)
    graded = algorithms.FedRS(alpha=0.5, **FEDRS | {"mode": "graded"})
    np.testing.assert_allclose(graded.scale(jnp.array([8, 4, 0]), 0), [1, 0.75, 0.5])


def test_fedrs_published_schedule():
    algorithm = algorithms.FedRS(alpha=0.1, mode="binary", growth=0.01, cap=0.8)
    scales = [
        float(algorithm.scale(jnp.array([1, 0]), number)[1])
        for number in (0, 1, 2, 11, 12)
    ]
    np.testing.assert_allclose(scales, [0.1, 0.11, 0.13, 0.76, 0.8], rtol=1e-6)


def test_fedrs_leaves_rows_of_absent_classes_alone_at_alpha_0():
    weight = jnp.ones((5, 3))
    features, label = jnp.arange(20.0).reshape(4, 5), jnp.array([0, 1, 0, 1])
    algorithm = algorithms.FedRS(alpha=0.0, **FEDRS)
    seen = tiny.seen(label_count=jnp.array([2, 2, 0]))

    def loss(weight):
        logits = algorithm.logits(features @ weight, seen)
        return losses.cross_entropy(logits, label)

    gradient = jax.grad(loss)(weight)
    np.testing.assert_array_equal(gradient[:, 2], 0)
    assert np.abs(gradient[:, :2]).min() > 0


def test_fedlc_by_hand():
    """Margins 16^(-1/4) = 1/2 and 1^(-1/4) = 1, and 2 of what counts as 1/16."""
    algorithm = algorithms.FedLC(tau=0.5, absent_count=1 / 16)
    seen = tiny.seen(label_count=jnp.array([16, 1, 0]))
    logits = jnp.array([[2.0, 1.0, -1.0]])
    lowered = np.array([[2.0 - 0.25, 1.0 - 0.5, -1.0 - 1.0]])
    np.testing.assert_allclose(algorithm.logits(logits, seen), lowered, rtol=1e-6)
    # The gradient of cross-entropy is softmax - one-hot, here of the lowered logits.
    expected = np.exp(lowered) / np.exp(lowered).sum() - [[0, 1, 0]]
    found = jax.grad(
        lambda x: losses.cross_entropy(algorithm.logits(x, seen), jnp.array([1]))
    )(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fedlc_leaves_absent_classes_out_of_the_softmax():
    seen = tiny.seen(label_count=jnp.array([16, 1, 0]))
    logits = jnp.array([[2.0, 1.0, 30.0]])

    def loss(logits):
        shown = algorithms.FedLC().logits(logits, seen)
        return losses.cross_entropy(shown, jnp.array([0]))

    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == pytest.approx(np.log1p(np.exp(1 - 1.0 - (2 - 0.5))), rel=1e-5)
    assert abs(gradient[0, 2]) < 1e-30


def test_feddyn_by_hand():
    algorithm = algorithms.FedDyn(alpha=0.5)
    old = ModelState({"w": jnp.array([1.0])}, {})
    new = ModelState({"w": jnp.array([3.0])}, {})
    state = {"w": jnp.array([0.25])}
    # h_i = 0.25 - 0.5 * (3 - 1)
    turn = tiny.turn(model=old, state=state)
    upload, moved = algorithm.upload(turn, new, jnp.array(0.0))
    assert upload is new
    np.testing.assert_allclose(moved["w"], [-0.75])
    seen = tiny.seen(model=old, state=state)
    gradient = jax.grad(algorithm.penalty)(new.params, seen)
    np.testing.assert_allclose(gradient["w"], [0.5 * 2 - 0.25])
    # Half of the clients: h = 0 - 0.5 * 0.5 * 2, w = 3 + 0.5 / 0.5
    server, model = algorithm.aggregate({"w": jnp.zeros(1)}, old, new, 0.5)
    np.testing.assert_allclose(server["w"], [-0.5])
    np.testing.assert_allclose(model.params["w"], [4.0])


def test_feddyn_server_keeps_the_mean_of_the_clients_states():
    state, _ = run(algorithms.FedDyn(alpha=0.1), 3, sizes=[8, 8, 8])
    mean = jax.tree.map(lambda h: h.mean(axis=0), state.client)
    close(state.server, mean)


def test_partial_participation():
    count, per_round = 5, 2
    state, loss = run(
        algorithms.FedBN(), 1, sizes=[10, 19, 8, 5, 6], clients_per_round=per_round
    )
    assert loss.shape == (per_round,)
    scales = state.client["params"]["bn/scale"]
    changed = np.flatnonzero(np.any(scales != 1, axis=1))
    axis = parallel.build(np.ones(count), num_devices=1)
    program = tiny.rounds(axis, clients_per_round=per_round)
    np.testing.assert_array_equal(
        changed, program.participation.participants(KEY, 0)[0]
    )
    drawn = [
        tuple(program.participation.participants(KEY, number)[0].tolist())
        for number in range(40)
    ]
    assert {len(set(who)) for who in drawn} == {per_round}
    assert {client for who in drawn for client in who} == set(range(count))


def test_a_round_of_some_equals_a_round_of_a_federation_of_them():
    sizes = [10, 19, 8, 5, 6]
    state, _ = run(algorithms.FedAvg(), 1, sizes=sizes, clients_per_round=2)
    axis = parallel.build(np.ones(5), num_devices=1)
    who = np.asarray(
        tiny.rounds(axis, clients_per_round=2).participation.participants(KEY, 0)[0]
    )
    data = tiny.dataset(sizes)
    alone = data.replace(client=trees.take(data.client, who))
    close(state.model, run(algorithms.FedAvg(), 1, data=alone)[0].model)


@pytest.mark.parametrize(
    ("at_once", "num_devices", "clients_per_round"), [(1, 1, 0), (2, 1, 3), (1, 2, 3)]
)
@pytest.mark.slow
def test_states_in_host_memory_change_no_result(
    at_once, num_devices, clients_per_round
):
    algorithm, data = algorithms.FedDyn(alpha=0.1), tiny.dataset([10, 19, 8, 5, 6])
    fields = {"clients_per_round": clients_per_round, "keep_models": True}
    expected, expected_loss = run(algorithm, 3, data=data, **fields)
    axis = parallel.build(
        np.asarray(data.client.size), at_once=at_once, num_devices=num_devices
    )
    program = tiny.rounds(axis, algorithm, **fields)
    model = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
    state = program.initial_state(model, KEY)
    state = state.replace(
        client=jax.tree.map(np.array, state.client),
        client_model=jax.tree.map(np.array, state.client_model),
    )
    on_host, placed = host_rounds.HostRounds(program), axis.place(data, whole=True)
    for number in range(3):
        state, loss, _ = on_host.run(placed, KEY, state, number)
    assert isinstance(jax.tree.leaves(state.client)[0], np.ndarray)
    close(state, expected)
    close(loss, expected_loss)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "fedprx",
            {},
            "init.method = 'fedprx': unknown, did you mean 'fedprox'?; or"
            " 'package.module:Class' of your own",
        ),
        ("fedprox", {"mu": -1.0}, "methods.fedprox.mu = -1.0: must be >= 0"),
        (
            "fedrs",
            {"mode": "none"},
            "methods.fedrs.mode = 'none': must be one of binary, graded",
        ),
    ],
)
def test_wrong_fields(name, fields, expected):
    with pytest.raises(errors.ConfigError) as error:
        registry.build(algorithms.ALGORITHMS, name, {name: fields})
    assert str(error.value) == expected


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_default_fields_build_every_algorithm(name):
    found = registry.build(algorithms.ALGORITHMS, name, {})
    assert type(found) is algorithms.ALGORITHMS[name]
