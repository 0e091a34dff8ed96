"""What every federated algorithm and every method of the server must hold to.

The tests go over the registries, with the fields' own defaults: a new method is covered
by being registered.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import prng, schema, trees
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.anchors import KINDS, Anchor
from mosaic_jax.fl.training import Local
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.cnn import CNN
from mosaic_jax.run import checkpoint, methods
from mosaic_jax.server.base import Task
from mosaic_jax.stages.host_rounds import HostRounds
from mosaic_jax.stages.prototype_federation import (
    FederationState,
    PrototypeFederation,
)
from mosaic_jax.stages.prototype_host import OnHost
from tests import tiny

KEY = prng.root(0)
SHAPE = (16, 16, 1)
NUM_CLASSES = 4
SIZES = [10, 19, 8, 13]
# By the client's number, where an algorithm deals out parts of the network.
RATES = np.array([1.0, 0.5, 1.0, 0.5])
NUM_ROUNDS = 2
# Sizes and counts of a method's fields are cut to this: tests compile, not train.
SMALL = 3
# Of clients that hold parts of it; all others have one that compiles sooner.
SLICED = Classifier(CNN(NUM_CLASSES, width=2), (0.4,), (0.3,))
SGD = Local(steps=2, batch_size=8, learning_rate=0.01, weight_decay=1e-3)
WHEN = {"once", "every_round"}
# Methods that need the clients' generators train after the rounds alone.
WITHIN_ROUNDS = [
    name for name, one in server.METHODS.items() if not one.asks_for_generators
]
NAMES = [*algorithms.ALGORITHMS, *WITHIN_ROUNDS]
every_method = pytest.mark.parametrize("name", NAMES)
# Those whose programs are large have the tests of this kind in the long form alone.
# One of them stands for the rest in the short form.
LARGE = {
    name
    for name in NAMES
    if (name in server.METHODS and name != "fedgen")
    or issubclass(algorithms.ALGORITHMS.get(name, object), PartialTraining)
}
every_method_large_ones_long = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
        for name in NAMES
    ],
)


def is_partial(name):
    return issubclass(algorithms.ALGORITHMS.get(name, object), PartialTraining)


def classifier_of(name):
    if is_partial(name):
        return SLICED
    return tiny.classifier(NUM_CLASSES)


def component(registry, name):
    """The method with its default fields, no larger than a test can pay for."""
    small = {
        key: min(value, SMALL) if type(value) is int else value
        for key, value in schema.defaults(registry[name]).items()
    }
    return schema.check(registry[name], small, f"methods.{name}")


def build(name, data, **layout):
    """Rounds of algorithm `name`, or of FedAvg with method `name` on the server."""
    fields = {
        "clients_per_round": layout.pop("clients_per_round", 0),
        "anchor": layout.pop("anchor", None),
    }
    if name in server.METHODS:
        algorithm = algorithms.FedAvg()
        fields["server"] = component(server.METHODS, name)
        fields["task"] = Task(
            classifier_of(name),
            SHAPE,
            NUM_CLASSES,
            "none",
            "auto",
            batch_norm="eval",
            num_clients=len(SIZES),
        )
    else:
        algorithm = component(algorithms.ALGORITHMS, name)
    axis = parallel.build(
        np.asarray(data.client.size), **{"at_once": 1, "num_devices": 1} | layout
    )
    if algorithm.exchanges == "prototypes":
        del fields["anchor"]  # settings refuse one
        return tiny.federation(algorithm, axis=axis, local=SGD, **fields)
    return tiny.rounds(
        axis,
        algorithm,
        classifier_of(name),
        RATES[data.client.number].tolist(),
        local=SGD,
        **fields,
    )


@functools.cache
def start(name):
    """The state before the first round."""
    model = jax.jit(classifier_of(name).init, static_argnums=1)(
        prng.named(KEY, "model"), SHAPE
    )
    program = build(name, tiny.dataset(SIZES))
    if isinstance(program, PrototypeFederation):
        return program.initial_state([model], KEY)
    return program.initial_state(model, KEY)


@functools.cache
def program(name, count):
    """A compiled round of `count` clients, one at a time."""
    return jax.jit(build(name, tiny.dataset(SIZES[:count])).run)


def run(name, data, state, numbers=range(NUM_ROUNDS), step=None):
    """State after rounds `numbers`, and the losses and metrics of the last."""
    step = step or program(name, data.num_clients)
    for number in numbers:
        state, loss, metrics = step(data, KEY, state, number)
    return state, (loss, metrics)


@functools.cache
def expected(name):
    return run(name, tiny.dataset(SIZES), start(name))


def of_clients(state, rows):
    """`state` with the clients `rows` only, in this order."""
    names = {"client", "client_model", "last_round"} & set(vars(state))
    return state.replace(**{n: trees.take(getattr(state, n), rows) for n in names})


def models(state):
    """The clients' models, and the global one if there is one."""
    if isinstance(state, FederationState):
        return state.client[0].model, ()
    return state.client_model, state.model


def close(found, wanted, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        wanted,
    )


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@every_method_large_ones_long
def test_everything_is_finite_and_moves(name):
    state, found = expected(name)
    assert trees.all_finite((state, found))
    for found, old in zip(models(state), models(start(name)), strict=True):
        assert found == () or trees.digest(found.params) != trees.digest(old.params)


@every_method_large_ones_long
def test_rounds_keep_the_types_of_their_state(name):
    """So that a loop of rounds is traced and compiled once."""
    data = tiny.dataset(SIZES)
    state, number = start(name), jnp.asarray(0)
    after, _, _ = jax.eval_shape(build(name, data).run, data, KEY, state, number)

    def types(leaf):
        leaf = jax.eval_shape(lambda x: x, leaf)
        return leaf.shape, leaf.dtype, leaf.weak_type

    assert jax.tree.map(types, after) == jax.tree.map(types, state)


@every_method_large_ones_long
def test_order_of_clients_does_not_matter(name):
    data, order = tiny.dataset(SIZES), np.array([2, 3, 0, 1])
    turned = data.replace(client=trees.take(data.client, order))
    state, _ = run(name, turned, of_clients(start(name), order))
    close(state, of_clients(expected(name)[0], order))


@every_method_large_ones_long
def test_a_client_of_weight_0_changes_nothing(name):
    """Be what it holds finite or not."""
    data = tiny.dataset(SIZES)
    last = len(SIZES) - 1
    nobody = dataclasses.replace(
        data.client,
        size=data.client.size.at[last].set(0),
        label_count=data.client.label_count.at[last].set(0),
    )
    broken = jax.tree.map(
        lambda x: x.at[last].set(jnp.nan) if x.dtype == jnp.float32 else x,
        start(name).client,
    )
    state, _ = run(
        name, data.replace(client=nobody), start(name).replace(client=broken)
    )
    rows = np.arange(last)
    alone = data.replace(client=trees.take(data.client, rows))
    without, _ = run(name, alone, of_clients(start(name), rows))
    close(of_clients(state, rows), without)


@every_method_large_ones_long
def test_resume_is_bit_for_bit(name, tmp_path):
    data = tiny.dataset(SIZES)
    state, _ = run(name, data, start(name), range(1))
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, state)
    _, restored, _ = saved.latest()
    saved.close()
    state = trees.restore_into(start(name), restored)
    same(run(name, data, state, range(1, NUM_ROUNDS)), expected(name))


@every_method_large_ones_long
def test_batched_equals_one_by_one(name):
    data = tiny.dataset(SIZES)
    step = jax.jit(build(name, data, at_once=len(SIZES)).run)
    close(run(name, data, start(name), step=step), expected(name))


@every_method
@pytest.mark.slow
def test_some_take_part_and_states_may_be_in_host_memory(name):
    data = tiny.dataset(SIZES)
    some = build(name, data, clients_per_round=2)
    state, (loss, _) = run(name, data, start(name), range(1), jax.jit(some.run))
    assert len(loss) == 2
    who = np.concatenate(some.participation.participants(KEY, 0))
    others = np.setdiff1d(np.arange(len(SIZES)), who)
    same(
        trees.take((state.client, models(state)[0]), others),
        trees.take((start(name).client, models(start(name))[0]), others),
    )
    moved = jax.tree.map(
        lambda new, old: jnp.any(new != old, axis=range(1, new.ndim)),
        models(state)[0].params,
        models(start(name))[0].params,
    )
    assert jnp.all(jnp.any(jnp.stack(jax.tree.leaves(moved)), axis=0)[who])
    names = {"client", "client_model"} & set(vars(state))
    on_host = start(name).replace(
        **{n: jax.tree.map(np.array, getattr(start(name), n)) for n in names}
    )
    on_host_before = jax.tree.map(np.array, on_host)
    kind = OnHost if isinstance(some, PrototypeFederation) else HostRounds
    host, _, _ = kind(some).run(data, KEY, on_host, 0)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(models(host)[0]))
    close(host, state)
    in_host, again = jax.tree.map(np.array, (data, on_host_before))
    gathered = kind(some, in_host)
    without, _, _ = gathered.run(data.replace(images=()), KEY, again, 0)
    same(without, host)


def has_no_model(name):
    return not algorithms.ALGORITHMS.get(name, algorithms.FedAvg).has_global_model


def exchanges_prototypes(name):
    algorithm = algorithms.ALGORITHMS.get(name)
    return algorithm is not None and algorithm.exchanges == "prototypes"


# Of the algorithms that deal out parts of the network one stands for all in short runs.
LONG = ("heterofl", "fedrolex")
# Whoever holds parts of the network cannot have the distilled one's answers, nor can
# clients whose last layer stays with them. Of the methods on the server one adds to the
# clients' loss itself.
ANCHORED = [
    pytest.param(name, kind, marks=[pytest.mark.slow] * (name in LONG))
    for name in (*algorithms.ALGORITHMS, "fedgen")
    for kind in KINDS
    if kind != "none"
    and not exchanges_prototypes(name)
    and not (kind == "distilled" and (is_partial(name) or has_no_model(name)))
]


@pytest.mark.parametrize(("name", "kind"), ANCHORED)
@pytest.mark.slow
def test_every_method_goes_with_every_anchor(name, kind):
    data, anchor = tiny.dataset(SIZES), Anchor(kind, 1.0, 2.0)
    some = build(name, data, clients_per_round=2, at_once=2, anchor=anchor)
    before = some.initial_state(start(name).model, KEY)
    same(before.anchor, start(name).model)
    step = jax.jit(some.run)
    state, found = run(name, data, before, step=step)
    assert trees.all_finite((state, found))
    same(state.anchor, start(name).model)
    free, _ = run(name, data, before.replace(anchor=expected(name)[0].model), step=step)
    assert trees.digest(free.model) != trees.digest(state.model)
    host = before.replace(
        client=jax.tree.map(np.array, before.client),
        client_model=jax.tree.map(np.array, before.client_model),
    )
    on_host = HostRounds(some)
    for number in range(NUM_ROUNDS):
        host, _, _ = on_host.run(data, KEY, host, number)
    close(host, state)


def test_server_methods_say_when_they_train():
    assert {method.when for method in server.METHODS.values()} <= WHEN


def test_lists_of_comparisons_name_what_there_is():
    known = {"mosaic", *algorithms.ALGORITHMS, *server.METHODS}
    for name in [one for listed in methods.LISTS.values() for one in listed]:
        parts = name.partition("@")[0].split("+")
        assert {part.removesuffix(methods.DECAY) for part in parts} <= known
