"""How many steps clients make in a round: epochs, and clients that are slow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import trees
from mosaic_jax.fl import algorithms, parallel, training, workload
from mosaic_jax.fl.training import Local
from mosaic_jax.stages import host_rounds
from tests import tiny
from tests.tiny import KEY, close

SIZES = [10, 19, 8]
EPOCHS = Local(epochs=2, batch_size=8, learning_rate=0.1, weight_decay=0.0)
SLOW = Local(steps=20, stragglers=0.5, straggler_share=0.25)


def done(local, numbers=(0,), sizes=SIZES):
    """Steps of each client in each of some rounds."""
    client = tiny.dataset(sizes).client
    one = jax.vmap(
        lambda client, number: workload.steps_done(local, client, KEY, number),
        in_axes=(0, None),
    )
    return np.stack([one(client, number) for number in numbers])


def test_epochs_are_passes_over_ones_own_images():
    np.testing.assert_array_equal(done(EPOCHS), [[4, 6, 2]])
    assert workload.most_steps(EPOCHS, 19) == 6
    assert workload.mean_steps(EPOCHS, np.array(SIZES)) == 4


def test_by_steps_nothing_is_drawn():
    local, client = Local(steps=7), tiny.dataset(SIZES).client
    assert workload.steps_done(local, client, KEY, 0) is None
    assert workload.mean_steps(local, np.array(SIZES)) == 7


def test_slow_clients_make_a_share_of_their_steps():
    found = done(SLOW, range(200))
    slow = found[found < 20]
    assert slow.min() == 5 and 0.4 < len(slow) / found.size < 0.6
    assert found.mean() == pytest.approx(workload.mean_steps(SLOW, SIZES), rel=0.05)
    assert len(np.unique(slow)) > 10
    # Of all shares between a tenth and one, on a grid, rounded down.
    few = dataclasses.replace(SLOW, steps=10, stragglers=1.0, straggler_share=0.1)
    share = np.linspace(0.1, 1, 100_001)[:-1]
    expected = np.maximum(np.floor(share * 10 + 1e-9), 1).mean()
    assert workload.mean_steps(few, SIZES) == pytest.approx(expected, rel=1e-3)
    # Everyone has at least one step to make.
    never = dataclasses.replace(SLOW, steps=1, stragglers=1.0)
    assert (done(never, range(5)) == 1).all()
    assert workload.mean_steps(never, SIZES) == 1


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("local", [EPOCHS, dataclasses.replace(EPOCHS, stragglers=0.8)])
def test_a_round_is_the_mean_of_clients_that_train_alone(local, at_once):
    """Each for as many steps as it gets done, on its own next minibatches."""
    data, number = tiny.dataset(SIZES), 1
    axis = parallel.build(np.array(SIZES), at_once=at_once, num_devices=1)
    program = tiny.rounds(axis, local=local)
    model = tiny.varied(tiny.classifier(), KEY)
    state, loss, _ = jax.jit(program.run)(
        data, KEY, program.initial_state(model, KEY), number
    )
    step = jax.jit(
        lambda model, batch: training.sgd_step(
            tiny.classifier(), training.sgd(0.1, 0.0), model, TX_STATE, batch
        )
    )
    counts, trained = done(local, [number])[0], []
    for i, count in enumerate(counts.tolist()):
        client, own, total = trees.take(data.client, i), model, 0.0
        first = 2 * -(-SIZES[i] // 8)
        for j in range(count):
            batch = training.client_batches(
                client,
                data.images,
                first + j,
                1,
                key=KEY,
                batch_size=8,
                augmentation="none",
            )(jnp.array(0))
            own, _, value = step(own, batch)
            total += float(value) / count
        trained.append(own)
        assert loss[i] == pytest.approx(total, rel=1e-4)
    mean = jax.tree.map(
        lambda *leaves: np.average(leaves, axis=0, weights=SIZES), *trained
    )
    close(state.model, mean)


TX_STATE = training.sgd(0.1, 0.0).init({})


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_of_one_client_is_sgd_whatever_its_steps(option):
    local = dataclasses.replace(EPOCHS, stragglers=1.0, straggler_share=0.5)
    one, other = (
        tiny.run_rounds(algorithm, data=tiny.dataset([19]), local=local)[0].model
        for algorithm in (algorithms.Scaffold(option=option), algorithms.FedAvg())
    )
    close(one, other)


# Every other upload is lost.
LOSSY = dataclasses.replace(tiny.LOCAL, failures=0.5, learning_rate=0.3)
SAME = [9, 9, 9]


def lossy(local, numbers, *, on_host=False, **fields):
    """The program of rounds of SCAFFOLD, and the states before and after each."""
    axis = parallel.build(np.array(SAME), num_devices=1)
    program = tiny.rounds(axis, algorithms.Scaffold(), local=local, **fields)
    state = program.initial_state(tiny.varied(tiny.classifier(), KEY), KEY)
    step = jax.jit(program.run)
    if on_host:
        kept = (state.client, state.client_model)
        kept = jax.tree.map(np.array, kept)
        state = state.replace(client=kept[0], client_model=kept[1])
        step = host_rounds.HostRounds(program).run
    states = [state]
    for number in numbers:
        state = jax.tree.map(np.array, state) if on_host else state
        state = step(tiny.dataset(SAME), KEY, state, number)[0]
        states.append(state)
    return program, states


def came(program, number):
    """Whether each client's upload arrives."""
    client = tiny.dataset(SAME).client
    return np.asarray(program.participation.turnout(client, KEY, number).arrived)


def test_an_upload_that_is_lost_changes_nothing():
    program, _ = lossy(LOSSY, [])
    number = next(n for n in range(50) if 0 < came(program, n).sum() < 3)
    program, (before, after) = lossy(LOSSY, [number])
    arrived = came(program, number)
    changed = np.any(after.client["fc"]["kernel"] != 0, axis=(1, 2))
    np.testing.assert_array_equal(changed, arrived)
    np.testing.assert_array_equal(after.last_round, np.where(arrived, number, -1))
    jax.tree.map(
        np.testing.assert_array_equal,
        trees.take(after.client_model, ~arrived),
        trees.take(before.client_model, ~arrived),
    )
    # The mean over those who arrived, and their share of all clients.
    mean = jax.tree.map(lambda leaf: leaf[arrived].mean(axis=0), after.client_model)
    close(after.model, mean)
    close(after.server, jax.tree.map(lambda c: c.mean(axis=0), after.client))


def test_without_any_upload_the_server_stays_as_it_was():
    nobody = dataclasses.replace(LOSSY, failures=0.9999)
    program, (before, after) = lossy(nobody, [0])
    assert not came(program, 0).any()
    same = (before.model, before.server, before.client)
    jax.tree.map(
        np.testing.assert_array_equal, (after.model, after.server, after.client), same
    )


@pytest.mark.parametrize("clients_per_round", [0, 2])
@pytest.mark.slow
def test_uploads_are_lost_alike_where_states_are_in_host_memory(clients_per_round):
    fields = {"clients_per_round": clients_per_round}
    _, states = lossy(LOSSY, range(3), **fields)
    _, on_host = lossy(LOSSY, range(3), on_host=True, **fields)
    close(on_host[-1], states[-1])
