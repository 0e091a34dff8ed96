"""FedProto and FedTGP: steps of a client and of the server, derived in NumPy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng
from mosaic_jax.core.types import Batch, Client, ModelState
from mosaic_jax.fl import algorithms, client_program, training
from mosaic_jax.fl.algorithms import fedtgp
from mosaic_jax.fl.class_means import (
    ClassMeans,
    GatheringSGD,
    GlobalPrototypes,
    Own,
    nearest,
    pooled,
)
from mosaic_jax.fl.training import Local
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.resnet import Linear
from mosaic_jax.run import study as studies
from tests import tiny

K, F = 3, 2
RNG = np.random.RandomState(0)


class Flat(nn.Module):
    """Two linear layers: gradients of all it does can be written down."""

    num_classes: int
    width: int = F

    def setup(self):
        self.first = Linear(self.width)
        self.fc = Linear(self.num_classes)

    def features(self, x, *, train, mask=None):
        return self.first(x.reshape(len(x), -1))

    def head(self, features):
        return self.fc(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train, mask=mask))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def dense(layer):
    return np.asarray(layer["kernel"], float), np.asarray(layer["bias"], float)


def test_pooling_by_hand():
    x = jnp.array([[1.0, 2.0, 6.0, 4.0, 8.0]])
    # Of five features the three parts are 0..1, 1..3 and 3..4, as in PyTorch.
    np.testing.assert_allclose(pooled(x, 3), [[1.5, 4.0, 6.0]], rtol=1e-6)
    np.testing.assert_allclose(pooled(x[:, :4], 2), [[1.5, 5.0]], rtol=1e-6)
    np.testing.assert_array_equal(pooled(x, 5), x)


def test_the_nearest_prototype_that_is_known():
    value = jnp.array([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    x = jnp.array([[0.9, 0.9], [4.0, 4.0]])
    found = nearest(x, GlobalPrototypes(value, jnp.array([True, True, True])))
    np.testing.assert_allclose(found[0], [-1.62, -0.02, -33.62], rtol=1e-5)
    assert found.argmax(axis=1).tolist() == [1, 2]
    found = nearest(x, GlobalPrototypes(value, jnp.array([True, False, False])))
    assert found.argmax(axis=1).tolist() == [0, 0]


ATTRACTION, RATE, DECAY = 1.5, 0.1, 0.01


def a_turn(width):
    """A client, its two minibatches and what it was sent; class 2 has no prototype."""
    classifier = Classifier(Flat(K, width), (0.5,), (0.5,))
    model = classifier.init(jax.random.key(1), (2, 2, 1))
    batches = [
        Batch(
            image=jnp.asarray(RNG.uniform(-1, 1, (4, 2, 2, 1)), jnp.float32),
            label=jnp.asarray(label),
            mask=jnp.asarray(mask),
        )
        for label, mask in (
            ([0, 2, 0, 1], [True] * 4),
            ([2, 0, 0, 1], [True, True, True, False]),
        )
    ]
    sent = GlobalPrototypes(
        jnp.array([[1.0, -1.0], [0.5, 2.0], [9.0, 9.0]]),
        jnp.array([True, True, False]),
    )
    local = Local(steps=2, batch_size=4, learning_rate=RATE, weight_decay=DECAY)
    counts = jnp.array([7, 1, 4], jnp.int32)
    client = Client(jnp.array(0), jnp.array([0]), jnp.array(12), counts)
    own = Own(model, jnp.zeros((K, F)), jnp.zeros(K, jnp.int32))
    key = prng.root(0)
    turn = client_program.Turn(
        ModelState({}, {}), sent, client, own, jnp.array(0), key, local
    )
    algorithm = algorithms.FedProto(attraction=ATTRACTION)
    program = GatheringSGD(classifier, algorithm, local, num_features=F, num_classes=K)
    return program, turn, batches


@pytest.mark.parametrize("width", [F, 2 * F])
def test_a_client_in_numpy(width):
    """Two steps of SGD on cross-entropy and distance; means of what it saw."""
    program, turn, batches = a_turn(width)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    result, loss = client_program.run(
        program, turn, lambda j: jax.tree.map(lambda leaf: leaf[j], stacked), 2
    )
    params = turn.state.model.params
    (w1, b1), (w2, b2) = dense(params["first"]), dense(params["fc"])
    # Each pooled feature is the mean of as many neighbours.
    pool = np.repeat(np.eye(F), width // F, axis=0) * F / width
    value, known = (np.asarray(x) for x in (turn.server.value, turn.server.known))
    sums, seen, losses = np.zeros((K, F)), np.zeros(K), []
    for batch in batches:
        there = np.asarray(batch.mask)
        x = np.asarray(batch.image, float).reshape(4, -1)[there]
        y = np.asarray(batch.label)[there]
        h = x @ w1 + b1
        p = softmax(h @ w2 + b2)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        at_head = (p - np.eye(K)[y]) / len(y)
        away = np.where(known[y, None], h @ pool - value[y], 0)
        at_h = at_head @ w2.T + ATTRACTION * 2 * away @ pool.T / (len(y) * F)
        for features, label in zip(h @ pool, y, strict=True):
            sums[label] += features
            seen[label] += 1
        slopes = (x.T @ at_h, at_h.sum(0), h.T @ at_head, at_head.sum(0))
        w1, b1, w2, b2 = (
            w - RATE * (slope + DECAY * w)
            for w, slope in zip((w1, b1, w2, b2), slopes, strict=True)
        )
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    found = result.model.params
    expected = {
        "first": {"kernel": w1, "bias": b1},
        "fc": {"kernel": w2, "bias": b2},
    }
    tiny.close(found, expected)
    tiny.close(result.state.model.params, expected)
    mean = sums / np.maximum(seen, 1)[:, None]
    np.testing.assert_allclose(result.state.mean, mean, rtol=1e-5, atol=1e-6)
    assert seen.tolist() == [4, 1, 2]
    assert result.state.count.tolist() == [7, 1, 4]
    assert result.upload == ()


def test_a_class_that_was_not_met_is_not_sent():
    program, turn, batches = a_turn(F)
    only = batches[0].replace(mask=jnp.array([True, False, True, False]))
    result, _ = client_program.run(program, turn, lambda j: only, 1)
    assert result.state.count.tolist() == [7, 0, 0]
    np.testing.assert_array_equal(result.state.mean[1:], 0)


def test_bytes_of_a_client():
    program, turn, _ = a_turn(F)
    found = program.traffic((2, 2, 1), turn.client)
    # Three classes held: F numbers and the class; F numbers and a flag come back.
    assert (found.up, found.down) == (3 * 4 * (F + 1), K * (4 * F + 1))
    lacks = dataclasses.replace(turn.client, label_count=np.array([7, 0, 4]))
    assert program.traffic((2, 2, 1), lacks).up == 2 * 4 * (F + 1)


def sent(*, broken=False):
    """What three clients sent; nobody sent class 2 of four, NaN stands for nothing."""
    mean = RNG.normal(size=(3, 4, F)).astype(np.float32)
    count = np.array([[3, 0, 0, 5], [1, 2, 0, 0], [0, 6, 0, 0]], np.int32)
    mean[count == 0] = np.nan if broken else 0
    return ClassMeans(jnp.asarray(mean), jnp.asarray(count), jnp.array([4, 0, 2]))


def test_fedproto_server_in_numpy():
    one, means = algorithms.FedProto(), sent(broken=True)
    state = one.init_prototypes(prng.root(0), 4, F)
    assert not np.any(one.prototypes(state).known)
    old = state.replace(value=jnp.full((4, F), 8.0), known=jnp.arange(4) == 2)
    found = one.prototypes(one.learn(old, means, prng.root(1))[0])
    mean, count = np.asarray(means.mean, float), np.asarray(means.count)
    expected = np.full((4, F), 8.0)
    for k in range(4):
        parts = [(count[i, k], mean[i, k]) for i in range(3) if count[i, k]]
        if parts:
            expected[k] = sum(n * m for n, m in parts) / sum(n for n, _ in parts)
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)
    assert found.known.tolist() == [True] * 4  # class 2 was known before
    never = one.learn(state, means, prng.root(1))[0]
    assert never.known.tolist() == [True, True, False, True]


def test_margin_by_hand():
    """The centre that is farthest from its nearest neighbour tells."""
    mean = jnp.array([[[0.0], [1.0], [7.0]], [[2.0], [0.0], [5.0]]])
    count = jnp.array([[1, 1, 1], [4, 0, 1]])
    # Centres 1 (plain mean of 0 and 2), 1 and 6.
    assert fedtgp.margin_of(ClassMeans(mean, count, jnp.arange(2))) == 5
    alone = ClassMeans(mean, count.at[:, 1:].set(0), jnp.arange(2))
    assert fedtgp.margin_of(alone) == 0


def test_fedtgp_server_in_numpy():
    """Two epochs of the network on minibatches of three of five class means."""
    rate, epochs, size = 0.05, 2, 3
    one = algorithms.FedTGP(
        epochs=epochs, batch_size=size, learning_rate=rate, max_margin=0.3
    )
    means, key = sent(broken=True), prng.root(3)
    state = one.init_prototypes(prng.root(0), 4, F)
    assert not np.any(one.prototypes(state).known)
    found, metrics = one.learn(state, means, key)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), state.params)
    e, (w1, b1), (w2, b2) = (
        params["embedding"],
        dense(params["Linear_0"]),
        dense(params["Linear_1"]),
    )
    # By the clients' numbers 0, 2, 4, then by class.
    pairs = [
        (np.asarray(means.mean[i, k], float), k)
        for i in (1, 2, 0)
        for k in range(4)
        if means.count[i, k]
    ]
    assert len(pairs) == 5
    margin = 0.3
    assert fedtgp.margin_of(means) > margin
    for number in range(epochs):
        order = np.asarray(training.epoch_order(prng.root(3), number, 5, 12))[:5]
        for first in range(0, 5, size):
            batch = [pairs[i] for i in order[first : first + size]]
            m, y = np.stack([m for m, _ in batch]), np.array([k for _, k in batch])
            a = e @ w1 + b1
            h = np.maximum(a, 0)
            t = h @ w2 + b2
            away = t[None] - m[:, None]
            distance = np.sqrt((away**2).sum(axis=-1))
            scores = -(distance + margin * np.eye(4)[y])
            p = softmax(scores)
            loss = -np.log(p[np.arange(len(y)), y]).mean()
            at_distance = -(p - np.eye(4)[y]) / len(y)
            at_t = (at_distance[..., None] * away / distance[..., None]).sum(axis=0)
            at_a = at_t @ w2.T * (a > 0)
            slopes = (at_a @ w1.T, e.T @ at_a, at_a.sum(0), h.T @ at_t, at_t.sum(0))
            e, w1, b1, w2, b2 = (
                w - rate * slope
                for w, slope in zip((e, w1, b1, w2, b2), slopes, strict=True)
            )
    tiny.close(
        found.params,
        {
            "embedding": e,
            "Linear_0": {"kernel": w1, "bias": b1},
            "Linear_1": {"kernel": w2, "bias": b2},
        },
    )
    value = np.maximum(e @ w1 + b1, 0) @ w2 + b2
    made = one.prototypes(found)
    np.testing.assert_allclose(made.value, value, rtol=1e-4, atol=1e-5)
    assert np.all(made.known)
    assert metrics["margin"] == pytest.approx(margin)
    assert metrics["server_loss"] == pytest.approx(loss, rel=1e-4)


def test_fedtgp_separates_what_fedproto_leaves_close():
    """Its reason to be: prototypes lie farther apart than the mean class means do."""
    close = jnp.array([[[0.0, 0.1], [0.2, 0.0]], [[0.1, 0.0], [0.0, 0.2]]])
    means = ClassMeans(close, jnp.ones((2, 2), jnp.int32), jnp.arange(2))

    def apart(algorithm):
        state = algorithm.init_prototypes(prng.root(0), 2, F)
        state, _ = jax.jit(algorithm.learn)(state, means, prng.root(1))
        value = algorithm.prototypes(state).value
        return float(jnp.linalg.norm(value[0] - value[1]))

    assert apart(algorithms.FedTGP(epochs=50)) > 2 * apart(algorithms.FedProto())


@pytest.mark.parametrize("one", [algorithms.FedProto(), algorithms.FedTGP(epochs=2)])
def test_nobody_sends_anything(one):
    state = one.init_prototypes(prng.root(0), 4, F)
    nothing = sent().replace(count=jnp.zeros((3, 4), jnp.int32))
    state, _ = one.learn(state, nothing, prng.root(1))
    assert not np.any(one.prototypes(state).known)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"method": "mosaic"},
            "init.method = 'fedproto': must be another for method = 'mosaic', whose"
            " experts are means of the clients' models",
        ),
        (
            {"server__method": "fedftg"},
            "server.method = 'fedftg': must be 'none' for init.method = 'fedproto',"
            " whose rounds end in no global model",
        ),
        (
            {"model__others": ("mlp",), "init__clients_per_round": 1},
            "init.clients_per_round = 1: must be larger: no client with the network"
            " 'mlp' would take part",
        ),
    ],
)
def test_what_it_does_not_go_with(changes, expected):
    fields = {"method": "federated", "init__method": "fedproto"} | changes
    with pytest.raises(errors.ConfigError) as error:
        studies.build(tiny.study(**fields))
    assert str(error.value) == expected
