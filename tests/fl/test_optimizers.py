"""Local optimisers against PyTorch, and their rates over rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.fl import algorithms, optimizers, parallel, training
from mosaic_jax.fl.training import Local
from tests import tiny
from tests.tiny import KEY, close

LOCAL = dataclasses.replace(tiny.LOCAL, learning_rate=0.4)
RATE, DECAY, MOMENTUM = 0.1, 0.3, 0.7
SLOPES = [[0.5, -2.0], [1.0, 0.25], [-3.0, 0.0], [0.1, 0.2]]


def steps(tx, slopes=SLOPES):
    """Parameters from (1, -1) after steps along `slopes`."""
    params = jnp.array([1.0, -1.0])
    state = tx.init(params)
    for slope in slopes:
        change, state = tx.update(jnp.array(slope), state, params)
        params = optax.apply_updates(params, change)
    return np.asarray(params)


# What PyTorch 2.14 makes of them: SGD, with momentum, with nesterov=True, Adam, AdamW,
# after clip_grad_norm_ where the second is not 0.
@pytest.mark.parametrize(
    ("name", "clip", "expected"),
    [
        ("sgd", 0.0, [1.026569, -0.746281]),
        ("sgd", 1.0, [0.858877, -0.839571]),
        ("momentum", 0.0, [0.953786, -0.395979]),
        ("momentum", 1.0, [0.685741, -0.633291]),
        ("nesterov", 0.0, [1.008048, -0.359157]),
        ("nesterov", 1.0, [0.655773, -0.60333]),
        ("adam", 0.0, [0.830695, -0.72442]),
        ("adam", 1.0, [0.73369, -0.712998]),
        ("adamw", 0.0, [0.761897, -0.666898]),
        ("adamw", 1.0, [0.701094, -0.696917]),
    ],
)
def test_is_pytorchs(name, clip, expected):
    local = Local(
        optimizer=name,
        learning_rate=RATE,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        clip_norm=clip,
    )
    found = steps(training.optimizer(local))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_momentum_by_hand():
    """v = 2, then 0.5 * 2 + 1."""
    local = Local(
        optimizer="momentum", learning_rate=0.1, weight_decay=0.0, momentum=0.5
    )
    found = steps(training.optimizer(local), [[2.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(found, [1 - 0.1 * 2 - 0.1 * 2, -1])


def test_one_of_optax_by_name():
    local = Local(optimizer="optax:lion", learning_rate=RATE, weight_decay=0.0)
    np.testing.assert_array_equal(
        steps(training.optimizer(local)), steps(optax.lion(RATE))
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sdg", "unknown, did you mean 'sgd'?"),
        ("optax:global_norm", "must be a function of a learning rate that returns"),
        ("optax:no_such", "cannot be imported"),
    ],
)
def test_wrong_names(name, told):
    with pytest.raises(errors.ConfigError, match=told):
        training.optimizer(Local(optimizer=name))


def test_rates_over_rounds():
    def rates(rounds, **fields):
        local = Local(learning_rate=0.8, **fields)
        return [float(training.learning_rate(local, n)) for n in rounds]

    assert rates([0, 99]) == [0.8, 0.8]
    step = rates([0, 2, 3, 6], schedule="step", schedule_rounds=3, schedule_factor=0.5)
    np.testing.assert_allclose(step, [0.8, 0.8, 0.4, 0.2])
    cosine = rates(
        [0, 2, 4, 9], schedule="cosine", schedule_rounds=4, schedule_factor=0.25
    )
    np.testing.assert_allclose(cosine, [0.8, 0.8 * 0.625, 0.2, 0.2], rtol=1e-6)


def test_a_round_has_the_rate_of_its_number():
    """The second is as one of half the rate that starts where the first ends."""
    axis = parallel.build(np.array([10, 19]), num_devices=1)
    data, slow = tiny.dataset([10, 19]), dataclasses.replace(LOCAL, learning_rate=0.2)
    fading = dataclasses.replace(LOCAL, schedule="step", schedule_factor=0.5)
    model = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
    found = []
    for locals_ in ((LOCAL, slow), (fading, fading)):
        state = tiny.rounds(axis).initial_state(model, KEY)
        for number, local in enumerate(locals_):
            step = jax.jit(tiny.rounds(axis, local=local).run)
            state, _, _ = step(data, KEY, state, number)
        found.append(state.model)
    close(*found)


def test_clients_train_by_the_optimizer_afresh_in_each_turn():
    data = tiny.dataset([19])
    local = dataclasses.replace(LOCAL, optimizer="adam", learning_rate=0.01)
    program = algorithms.FedAvg().program(tiny.classifier(), local)
    model = tiny.classifier().init(prng.named(KEY, "model"), (16, 16, 1))
    batch = training.client_batches(
        trees.take(data.client, 0),
        data.images,
        0,
        1,
        key=KEY,
        batch_size=8,
        augmentation="none",
    )(0)
    turn = tiny.turn(model=model)
    (moved, _), _ = jax.jit(program.step)(turn, program.init(turn), batch, 0)
    # Adam's first step is the rate along each sign.
    way = np.abs(moved.params["fc"]["kernel"] - model.params["fc"]["kernel"])
    np.testing.assert_allclose(way, 0.01, rtol=1e-3)


@pytest.mark.parametrize("name", optimizers.LINEAR)
@pytest.mark.parametrize("count", [1, 4])
def test_gradients_in(name, count):
    """They are how far steps of rate 1 go along gradients of 1."""
    tx = optimizers.OPTIMIZERS[name](1.0, 0.0, MOMENTUM)
    way = 1 - steps(tx, [[1.0, 0.0]] * count)[0]
    found = optimizers.gradients_in(name, MOMENTUM, count)
    assert found == pytest.approx(way, rel=1e-5)
