"""Uploads on their way: attacked, compressed and combined in rounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.fl import algorithms, attacks, compression, parallel, uploads
from mosaic_jax.fl.compression import COMPRESSORS, Sign, TopK
from mosaic_jax.fl.robust import Krum, Mean, Median, TrimmedMean
from mosaic_jax.fl.sending import Sending
from mosaic_jax.run import checkpoint
from mosaic_jax.stages.host_rounds import IN_HOST, HostRounds
from tests import tiny
from tests.tiny import KEY, close

SIZES = [10, 19, 8, 13, 9]
CLIENTS = len(SIZES)
# Steps so long that clients' models differ.
LOCAL = dataclasses.replace(tiny.LOCAL, steps=2, learning_rate=0.3)
COUNTS = {"num_attackers": 2, "num_clients": CLIENTS}
FLIP = Sending(attack=attacks.SignFlip(), **COUNTS)
ALIE = Sending(attack=attacks.ALIE(z=2.0), **COUNTS)
SIGNS = Sending(compressor=Sign())
# All at once: a rule, an attack, and what is left out kept for the next round.
ALL = Sending(TrimmedMean(), 1, attacks.SignFlip(), 2, CLIENTS, TopK(share=0.1))
EVERY = {"plain": Sending(), "flip": FLIP, "alie": ALIE, "signs": SIGNS, "all": ALL}
LONG = ("plain", "flip", "signs", "alie")
every_sending_some_long = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in EVERY],
)
# Those whose uploads, or states, are unlike those of all others.
UNLIKE = ("fedavg", "scaffold", "fednova", "fedper")
# Algorithms whose clients send the upload of the whole network.
WHOLE = [
    name
    for name, one in algorithms.ALGORITHMS.items()
    if one.exchanges == "models" and one.holdings is algorithms.FedAvg.holdings
]


def build(sending, algorithm=None, *, num_devices=1, at_once=1, **fields):
    axis = parallel.build(np.array(SIZES), at_once=at_once, num_devices=num_devices)
    fields = {"local": LOCAL, "sending": sending} | fields
    return tiny.rounds(axis, algorithm, **fields)


def start(program):
    return program.initial_state(tiny.varied(tiny.classifier(), KEY), KEY)


def run(program, count=2, data=None, first=0):
    """State after rounds `first`, `first` + 1, ..., `count` of them."""
    data = data or tiny.dataset(SIZES)
    placed = program.axis.place(data, whole=program.axis.num_devices > 1)
    step, state = jax.jit(program.run), start(program)
    for number in range(first, first + count):
        state, _, _ = step(placed, KEY, state, number)
    return state


@functools.cache
def after(name, count=2):
    """The state after `count` rounds with one of `EVERY`."""
    return run(build(EVERY[name]), count)


def hostile():
    """Whether each client attacks."""
    return np.isin(np.arange(CLIENTS), attacks.drawn(KEY, CLIENTS, 2))


def mean(models):
    return trees.weighted_mean(models, jnp.asarray(SIZES, jnp.float32))


def changed(function):
    """The clients' models of a round, the changes of attackers' parameters others."""
    old, honest = start(build(Sending())).model, after("plain", 1).client_model
    who = hostile()

    def one(sent, before):
        sent = np.array(sent)
        sent[who] = np.asarray(before) + function((sent - np.asarray(before))[who])
        return sent

    return honest.replace(params=jax.tree.map(one, honest.params, old.params))


def test_attackers_send_another_sign_and_all_else_is_as_it_was():
    expected, state = changed(np.negative), after("flip", 1)
    close(state.client_model, expected)
    close(state.model, mean(expected))
    assert not tiny.are_close(state.model, after("plain", 1).model)


def test_attackers_who_know_each_other_send_the_same():
    def sent(update):
        return update.mean(axis=0) - 2.0 * update.std(axis=0)

    expected, state = changed(sent), after("alie", 1)
    close(state.client_model, expected, rtol=1e-4)
    close(state.model, mean(expected), rtol=1e-4)


def test_the_server_gets_what_the_rule_makes_of_the_uploads():
    models = jax.tree.map(np.asarray, changed(np.negative))
    found = run(build(dataclasses.replace(FLIP, rule=Krum(), withstands=1)), 1)
    each = [tiny.are_close(found.model, trees.take(models, i)) for i in range(CLIENTS)]
    assert sum(each) == 1 and not hostile()[each.index(True)]


@pytest.mark.slow
def test_a_rule_is_told_the_attackers_that_it_withstands():
    one, other = (
        run(build(Sending(TrimmedMean(), count)), 1).model for count in (1, 2)
    )
    assert not tiny.are_close(one, other)


@pytest.mark.parametrize(
    "clients_per_round", [pytest.param(0, marks=pytest.mark.slow), 4]
)
def test_uploads_that_are_lost_do_not_count(clients_per_round):
    local = dataclasses.replace(LOCAL, failures=0.4)
    sending = dataclasses.replace(FLIP, rule=Median())
    program = build(sending, local=local, clients_per_round=clients_per_round)
    data = tiny.dataset(SIZES)

    def came(number):
        turnout = program.participation.turnout(data.client, KEY, number)
        return np.asarray(turnout.who)[turnout.arrived], len(turnout.who)

    number = next(n for n in range(50) if 1 < len(came(n)[0]) < came(n)[1])
    state = run(program, 1, first=number)
    who = came(number)[0]
    sent = trees.take(state.client_model, who)
    close(state.model, jax.tree.map(lambda leaf: np.median(leaf, axis=0), sent))


def test_what_compression_leaves_out_is_kept_and_sent_later():
    """The model that the server reads, and the error, are the update in sum."""
    first = start(build(SIGNS))
    state = after("signs", 1)
    honest = uploads.parameters(after("plain", 1).client_model)
    read = uploads.parameters(state.client_model)
    close(tuple(map(jnp.add, read, state.error)), honest)
    old = uploads.parameters(first.model)
    for sent, before in zip(read, old, strict=True):
        # Two values, plus and minus, of each client and array.
        size = np.abs(np.asarray(sent) - np.asarray(before)[None]).reshape(CLIENTS, -1)
        np.testing.assert_allclose(
            size, size[:, :1].repeat(size.shape[1], 1), rtol=1e-3
        )
    close(state.model, mean(state.client_model))
    # Batch-norm's statistics are sent as they are.
    close(state.client_model.batch_stats, after("plain", 1).client_model.batch_stats)


@pytest.mark.slow
def test_nothing_is_kept_without_feedback():
    free = run(build(Sending(compressor=Sign(error_feedback=False))))
    assert free.error == ()
    assert not tiny.are_close(free.model, after("signs").model)


@every_sending_some_long
def test_sharded_equals_a_single_device(name):
    close(run(build(EVERY[name], num_devices=2)), after(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_batched_equals_one_by_one(name):
    close(run(build(EVERY[name], at_once=CLIENTS)), after(name))


@pytest.mark.parametrize(
    ("name", "clients_per_round"),
    [
        ("all", 3),
        *(pytest.param(n, 0, marks=pytest.mark.slow) for n in ("all", "signs")),
    ],
)
def test_states_may_be_in_host_memory(name, clients_per_round):
    program = build(EVERY[name], clients_per_round=clients_per_round)
    data, state = tiny.dataset(SIZES), start(program)
    kept = {n: jax.tree.map(np.array, getattr(state, n)) for n in IN_HOST}
    state, on_host = state.replace(**kept), HostRounds(program)
    for number in range(2):
        state, _, _ = on_host.run(data, KEY, state, number)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state.error))
    close(state, run(program))


def test_resume_is_bit_for_bit(tmp_path):
    program = build(ALL)
    step, data = jax.jit(program.run), tiny.dataset(SIZES)
    state = after("all", 1)
    assert any(jnp.any(leaf != 0) for leaf in state.error)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, state)
    _, restored, _ = saved.latest()
    saved.close()
    found = step(data, KEY, trees.restore_into(start(program), restored), 1)
    expected = step(data, KEY, state, 1)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_without_any_of_it_the_program_is_the_same():
    data = tiny.dataset(SIZES)
    programs = [
        str(jax.make_jaxpr(program.run)(data, KEY, start(program), 0))
        for program in (
            tiny.rounds(parallel.build(np.array(SIZES), num_devices=1), local=LOCAL),
            build(Sending(withstands=1, **COUNTS)),
        )
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("name", WHOLE)
def test_every_algorithm_says_what_its_uploads_are(name):
    """The reference is an upload of the model as it was sent, and both are read so."""
    algorithm = algorithms.ALGORITHMS[name]()
    sent = tiny.varied(tiny.classifier(), KEY)
    trained = jax.tree.map(lambda leaf: 1.5 * leaf + 1, sent)
    turn = tiny.turn(model=sent, state=algorithm.init_client(sent))
    if algorithm.sends_state:
        turn = turn.replace(server=algorithm.init_server(sent))
    upload, _ = algorithm.upload(turn, trained, jnp.array(1.0))
    reference = algorithm.reference(sent)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (reference, upload)]
    assert shapes[0] == shapes[1]

    def received(model):
        return algorithm.download(model)  # what stays with a client is not sent

    close(received(algorithm.sent_model(upload, sent)), received(trained))
    close(algorithm.sent_model(reference, sent), sent)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in UNLIKE))
        for name in WHOLE
    ],
)
def test_every_algorithm_keeps_the_types_of_its_state(name):
    """With everything on: loops of rounds are traced and compiled once."""
    program = build(ALL, algorithms.ALGORITHMS[name]())
    state, data = start(program), tiny.dataset(SIZES)
    after, _, _ = jax.eval_shape(program.run, data, KEY, state, jnp.asarray(0))

    def types(leaf):
        leaf = jax.eval_shape(lambda x: x, leaf)
        return leaf.shape, leaf.dtype, leaf.weak_type

    assert jax.tree.map(types, after) == jax.tree.map(types, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_every_algorithm_goes_with_all_of_it(name):
    algorithm = algorithms.ALGORITHMS[name]()
    state = run(build(ALL, algorithm))
    assert trees.all_finite(state)
    assert not tiny.are_close(state.model, run(build(Sending(), algorithm)).model)
    data = tiny.dataset(SIZES)
    turned = data.replace(client=trees.take(data.client, np.array([2, 4, 0, 3, 1])))
    close(run(build(ALL, algorithm), data=turned).model, state.model, rtol=1e-3)


@pytest.mark.parametrize("rule", [Mean(), Median()])
@pytest.mark.parametrize("compressor", [None, *COMPRESSORS])
def test_the_ledger_counts_the_arrays_that_are_sent(rule, compressor):
    """Of clients that are compressed one by one, whatever the server makes of it."""
    found = COMPRESSORS[compressor]() if compressor else None
    program = build(Sending(rule=rule, compressor=found))
    client = tiny.dataset(SIZES).client
    traffic = program.round_bytes((16, 16, 1), client)
    model, total = start(program).model, 0
    for i in range(CLIENTS):
        message = plain_upload(i)
        if found is not None:
            update = uploads.update_of(message, model)
            message = uploads.with_parameters(message, update)
            message = compression.encode(found, message, prng.root(i))
        total += sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(message))
    assert traffic.up == total
    assert traffic.down == CLIENTS * trees.num_bytes(model)
    assert (compressor is None) == (traffic.up == traffic.down)


def plain_upload(i):
    """What an honest client sends, of FedAvg: its model."""
    return trees.take(after("plain", 1).client_model, i)
