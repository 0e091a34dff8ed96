"""Minibatches, local training and federated rounds against plain loops."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Batch
from mosaic_jax.fl import client_program, parallel, training
from mosaic_jax.nn import losses
from tests import tiny
from tests.tiny import KEY, LOCAL, close


def make_round(data, key=KEY, **layout):
    layout = {"num_devices": 1} | layout
    axis = parallel.build(np.asarray(data.client.size), **layout)
    placed = axis.place(data)
    return jax.jit(functools.partial(tiny.rounds(axis).run, placed, key))


def start(data):
    model = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
    axis = parallel.build(np.asarray(data.client.size), num_devices=1)
    return tiny.rounds(axis).initial_state(model, KEY)


def client_batch(data, client, step, **settings):
    client = trees.take(data.client, client)
    settings = {"key": KEY, "batch_size": 4, "augmentation": "none"} | settings
    return training.client_batches(client, data.images, step, 1, **settings)(0)


def rows_by(data, length, batch_size=8, total=40):
    """Image numbers and masks of all clients, drawn `length` steps at a time."""

    @jax.jit
    def draw(first):
        return jax.vmap(
            lambda client: training.client_rows(
                client, first, length, key=KEY, batch_size=batch_size
            )
        )(data.client)

    parts = [draw(first) for first in range(0, total, length)]
    return jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis=1)[:, :total], *parts
    )


@pytest.mark.parametrize("size", [1, 4, 6, 13])
def test_an_epoch_shows_every_image_once(size):
    per_epoch = int(training.steps_per_epoch(jnp.array(size), 4))
    rows, mask = rows_by(tiny.dataset([size], pad=7), 1, 4, 2 * per_epoch)
    orders = []
    for epoch in range(2):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = rows[0, steps][mask[0, steps]].tolist()
        assert sorted(seen) == list(range(size))
        orders.append(seen)
    if size == 13:
        assert orders[0] != orders[1]


@pytest.mark.parametrize("length", [1, 3, 10, 40])
def test_minibatches_are_those_that_were_always_drawn(length):
    """Recorded when every step still sorted its whole epoch for itself."""
    rows, mask = rows_by(tiny.dataset([1, 6, 40, 75], pad=3), length)
    drawn = np.concatenate([rows, mask], axis=2).astype(np.int32).swapaxes(0, 1)
    assert hashlib.sha256(np.ascontiguousarray(drawn).tobytes()).hexdigest() == (
        "5d7f5b466a6843eea725f56ad3088f9f3443ddb81605b71e9dd5e567b23f0e2e"
    )


def primitives(jaxpr, around=frozenset()):
    """Each primitive of a program, and the loops that lie around it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, around
        loop = equation.primitive.name in ("while", "scan")
        within = around | {id(equation)} if loop else around
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from primitives(part, within)


def test_no_step_of_a_round_sorts():
    data = tiny.dataset([10, 19, 8])
    axis = parallel.build(np.asarray(data.client.size), at_once=3, num_devices=1)
    program = jax.make_jaxpr(functools.partial(tiny.rounds(axis).run, data, KEY))

    def around(name, jaxpr):
        return [loops for found, loops in primitives(jaxpr) if found == name]

    jaxpr = program(start(data), 0).jaxpr
    sorting, training_ = around("sort", jaxpr), around("dot_general", jaxpr)
    assert len(sorting) == 2  # of epochs at the ends of a round, and in between
    assert training_
    assert not frozenset.union(*sorting) & frozenset.union(*training_)


def test_padding_changes_no_batch():
    short, long = tiny.dataset([5, 9]), tiny.dataset([5, 9], pad=7)

    for client, steps in ((0, 2), (1, 3)):
        for step in range(2 * steps):
            jax.tree.map(
                np.testing.assert_array_equal,
                client_batch(short, client, step),
                client_batch(long, client, step),
            )


def test_one_client_is_plain_sgd():
    data, classifier = tiny.dataset([20]), tiny.classifier()
    state, federated_round = start(data), make_round(data)
    model = state.model
    for number in range(2):
        state, _, _ = federated_round(state, number)

    @jax.jit
    def plain_step(params, batch_stats, batch: Batch):
        def objective(params):
            logits, updated = classifier.train_logits(
                model.replace(params=params, batch_stats=batch_stats),
                batch.image,
                batch.mask,
            )
            return losses.cross_entropy(logits, batch.label, batch.mask), updated

        gradient, updated = jax.grad(objective, has_aux=True)(params)
        return (
            jax.tree.map(
                lambda p, g: p - LOCAL.learning_rate * (g + LOCAL.weight_decay * p),
                params,
                gradient,
            ),
            updated,
        )

    params, batch_stats = model.params, model.batch_stats
    for step in range(2 * LOCAL.steps):
        batch = client_batch(data, 0, step, batch_size=LOCAL.batch_size)
        params, batch_stats = plain_step(params, batch_stats, batch)
    close(state.model.params, params, rtol=1e-4)
    close(state.model.batch_stats, batch_stats, rtol=1e-4)


def test_batched_clients_equal_one_at_a_time():
    data = tiny.dataset([10, 19, 8])
    state = start(data)
    after, loss, _ = make_round(data)(state, 0)
    axis = parallel.build(np.asarray(data.client.size), num_devices=1)
    program = tiny.rounds(axis).holdings.program(1.0, LOCAL)

    @jax.jit
    def alone(client):
        turn = tiny.turn(model=state.model)
        turn = turn.replace(client=trees.take(data.client, client))
        return client_program.run(
            program,
            turn,
            lambda step: client_batch(data, client, step, batch_size=LOCAL.batch_size),
            LOCAL.steps,
        )

    for client in range(3):
        result, alone_loss = alone(client)
        close(trees.take(after.client_model, client), result.model, rtol=1e-4)
        close(loss[client], alone_loss)


@pytest.mark.parametrize(
    ("at_once", "num_devices"), [(2, 1), (3, 1), (5, 1), (1, 2), (2, 2), (1, 4)]
)
def test_layout_changes_no_result(at_once, num_devices):
    data = tiny.dataset([10, 19, 8, 5, 6])
    expected = make_round(data, at_once=1)(start(data), 0)
    found = make_round(data, at_once=at_once, num_devices=num_devices)(start(data), 0)
    close(found, expected)


def test_same_seed_same_result_and_another_seed_another():
    data = tiny.dataset([10, 19])
    first, _, _ = make_round(data)(start(data), 0)
    second, _, _ = make_round(data)(start(data), 0)
    assert trees.digest(first) == trees.digest(second)
    other, _, _ = make_round(data, prng.root(1))(start(data), 0)
    assert trees.digest(first) != trees.digest(other)


def test_a_key_that_is_drawn_from_twice_does_not_pass_here():
    def twice(key):
        return jax.random.normal(key) + jax.random.uniform(key)

    with pytest.raises(jax.errors.KeyReuseError):
        jax.jit(twice)(jax.random.key(0))
