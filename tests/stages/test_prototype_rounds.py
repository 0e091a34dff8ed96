"""Rounds of prototypes: whose models change, what counts, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.fl import algorithms, parallel, training
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.mlp import MLP
from mosaic_jax.stages.prototype_host import OnHost
from tests import tiny
from tests.tiny import KEY, LOCAL

SIZES = [10, 19, 8, 13, 9]
SHAPE = (16, 16, 1)
# Four features and six.
NETWORKS = (tiny.classifier(), Classifier(MLP(4, width=6), (0.4,), (0.3,)))
METHODS = {
    "fedproto": algorithms.FedProto(),
    "fedtgp": algorithms.FedTGP(epochs=3),
}


def federation(algorithm, networks=NETWORKS, sizes=SIZES, **fields):
    axis = parallel.build(np.asarray(sizes), at_once=1, num_devices=1)
    return tiny.federation(algorithm, networks, axis=axis, **fields)


def start(program):
    models = [
        one.init(prng.at(prng.named(KEY, "model"), i), SHAPE)
        for i, one in enumerate(program.classifiers)
    ]
    return program.initial_state(models, KEY)


def run(program, count, data=None, state=None):
    data = data or tiny.dataset(SIZES)
    state = start(program) if state is None else state
    step = jax.jit(program.run)
    for number in range(count):
        state, loss, metrics = step(data, KEY, state, number)
    return state, loss, metrics


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_without_attraction_clients_train_alone_bit_for_bit():
    """As on their own minibatches, one after the other, without any server."""
    data, rounds = tiny.dataset(SIZES), 3
    program = federation(algorithms.FedProto(attraction=0.0))
    found, _, _ = run(program, rounds)
    tx = training.sgd(LOCAL.learning_rate, LOCAL.weight_decay)

    def alone(classifier, model, client):
        for number in range(rounds):

            @jax.jit
            def steps(model, number):
                batch_at = training.client_batches(
                    client,
                    data.images,
                    number * LOCAL.steps,
                    LOCAL.steps,
                    key=KEY,
                    batch_size=LOCAL.batch_size,
                    augmentation="none",
                )

                def body(j, model):
                    opt_state = tx.init(model.params)
                    return training.sgd_step(
                        classifier, tx, model, opt_state, batch_at(j)
                    )[0]

                return jax.lax.fori_loop(0, LOCAL.steps, body, model)

            model = steps(model, number)
        return model

    first = start(program)
    for i, classifier in enumerate(NETWORKS):
        # One client of each network: each is a program of its own.
        client = trees.take(data.client, program.members[i][1])
        model = trees.take(first.client[i].model, 1)
        expected = alone(classifier, model, client)
        same(trees.take(found.client[i].model, 1), expected)
    # With it they do not.
    pulled, _, _ = run(federation(algorithms.FedProto(attraction=5.0)), rounds)
    assert trees.digest(pulled.client[0].model) != trees.digest(found.client[0].model)


@pytest.mark.slow
def test_the_first_round_knows_no_prototypes():
    """Then all networks learn from all: nothing else links their clients."""
    once = [run(federation(METHODS["fedproto"]), 1)[0]]
    once += [run(federation(algorithms.FedProto(attraction=0.0)), 1)[0]]
    same(once[0].client, once[1].client)
    # Another network for clients 1 and 3: the first round of the others is the same,
    # the second is not.
    other = (NETWORKS[0], Classifier(MLP(4, width=7), (0.4,), (0.3,)))
    for count, equal in ((1, True), (2, False)):
        found = [
            run(federation(METHODS["fedproto"], networks), count)[0].client[0].model
            for networks in (NETWORKS, other)
        ]
        assert (trees.digest(found[0]) == trees.digest(found[1])) == equal


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_round_of_some_of_all_networks(name):
    program = federation(METHODS[name], clients_per_round=3)
    who = program.participants(KEY, 0)
    assert [len(rows) for rows in who] == [2, 1]
    state, loss, _ = run(program, 1)
    assert loss.shape == (3,)
    trained = np.concatenate(
        [m[np.asarray(rows)] for m, rows in zip(program.members, who, strict=True)]
    )
    assert np.flatnonzero(np.asarray(state.last_round) == 0).tolist() == sorted(trained)
    for i, rows in enumerate(who):
        others = np.setdiff1d(np.arange(len(program.members[i])), rows)
        same(*(trees.take(one.client[i], others) for one in (state, start(program))))
        assert np.all(np.sum(state.client[i].count, axis=1)[rows] > 0)
    # The server learns from theirs alone.
    data = tiny.dataset(SIZES)
    sent = [
        trees.take((own.mean, own.count), rows)
        for own, rows in zip(state.client, who, strict=True)
    ]
    count = np.concatenate([c for _, c in sent])
    mean = np.concatenate([m for m, _ in sent])
    if name == "fedproto":
        held = np.asarray(data.client.label_count)[trained]
        assert np.all((count == held) | (count == 0))
        total = np.maximum(count.sum(axis=0), 1)[:, None]
        expected = (count[..., None] * mean).sum(axis=0) / total
        np.testing.assert_allclose(state.server.value, expected, rtol=1e-5, atol=1e-6)
    on_host = start(program)
    on_host = on_host.replace(client=jax.tree.map(np.array, on_host.client))
    host, host_loss, _ = OnHost(program).run(data, KEY, on_host, 0)
    tiny.close((host, host_loss), (state, loss))


@pytest.mark.parametrize("name", METHODS)
def test_order_of_clients_does_not_matter(name):
    """Clients may change places with those that have the same network."""
    order = np.array([4, 3, 0, 1, 2])
    data = tiny.dataset(SIZES)
    turned = data.replace(client=trees.take(data.client, order))
    program = federation(METHODS[name])
    found, _, _ = run(program, 2, turned)
    expected, _, _ = run(program, 2)
    tiny.close(found.server, expected.server, rtol=1e-4)
    for i, rows in enumerate(([2, 0, 1], [1, 0])):
        tiny.close(
            found.client[i], trees.take(expected.client[i], np.array(rows)), rtol=1e-4
        )


def test_a_class_that_nobody_holds():
    """It gets no prototype, no images are taken for it, and nothing breaks."""
    data = tiny.dataset(SIZES)
    label = jnp.where(data.images.label == 3, 0, data.images.label)
    count = data.client.label_count
    count = count.at[:, 0].add(count[:, 3]).at[:, 3].set(0)
    data = data.replace(
        images=data.images.replace(label=label),
        client=data.client.replace(label_count=count),
    )
    program = federation(METHODS["fedproto"])
    state, loss, _ = run(program, 2, data)
    assert np.all(np.isfinite(loss))
    assert state.server.known.tolist() == [True, True, True, False]
    for own in state.client:
        assert not np.any(own.count[:, 3])


def test_what_a_client_answers():
    """By its head, or by the prototype that its features are nearest to."""
    data, program = tiny.dataset(SIZES), federation(METHODS["fedproto"])
    state, _, _ = run(program, 2)
    rows = {"test": np.array([[0, 1, 2, 3], [5, 6, 7, 8]], np.int32)}
    found = program.accuracies(
        1, state.client[1].model, state.server, rows, {"test": data.images}, 3
    )
    image = np.asarray(data.images.image, np.float32) / 127.5 - 1
    label = np.asarray(data.images.label)
    for client, mine in enumerate(rows["test"]):
        model = trees.take(state.client[1].model, client)
        features = np.asarray(NETWORKS[1].features(model, image[mine]))
        own = np.asarray(NETWORKS[1].head(model, features)).argmax(axis=1)
        assert found["test"]["own"][client] == np.mean(own == label[mine])
        # Six features become four: 0..1, 1..2, 3..4, 4..5.
        parts = [features[:, a:b].mean(axis=1) for a, b in ((0, 2), (1, 3), (3, 5))]
        point = np.stack([*parts, features[:, 4:6].mean(axis=1)], axis=1)
        away = ((point[:, None] - np.asarray(state.server.value)) ** 2).sum(axis=-1)
        expected = np.mean(away.argmin(axis=1) == label[mine])
        assert found["test"]["prototype"][client] == expected


def test_bytes_of_a_round():
    data = tiny.dataset(SIZES)
    held = np.asarray(data.client.label_count > 0).sum()
    # Of each class held four numbers and the class; of all four numbers and a flag.
    found = federation(METHODS["fedtgp"]).round_bytes(data.client)
    assert (found.up, found.down) == (held * 4 * (4 + 1), len(SIZES) * 4 * (4 * 4 + 1))
    found = federation(METHODS["fedtgp"], clients_per_round=3).round_bytes(data.client)
    assert found.up == round(held * 20 * 3 / 5)
    assert found.down == 3 * 68
