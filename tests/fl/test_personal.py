"""Algorithms whose clients keep models, or layers, of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, schema, trees
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import algorithms, parallel, training
from mosaic_jax.fl.client_program import Traffic
from tests import tiny
from tests.tiny import KEY, close

SIZES = [10, 19, 8]
SHAPE = (16, 16, 1)
LOCAL = dataclasses.replace(tiny.LOCAL, learning_rate=0.5)
LAYERS = [algorithms.FedPer(), algorithms.FedRep(head_share=0.6)]
layered = pytest.mark.parametrize("algorithm", LAYERS, ids=lambda x: type(x).__name__)


def run(algorithm, count=2, *, data=None, **fields):
    """State after `count` rounds."""
    fields = {"data": data or tiny.dataset(SIZES), "local": LOCAL} | fields
    return tiny.run_rounds(algorithm, count, **fields)[0]


def start():
    return tiny.classifier().init(prng.named(KEY, "model"), SHAPE)


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@layered
def test_heads_never_leave_their_clients(algorithm):
    state = run(algorithm, keep_models=True)
    same(state.model.params["fc"], start().params["fc"])
    kernels = state.client["params/fc/kernel"]
    same(kernels, state.client_model.params["fc"]["kernel"])
    assert not np.allclose(kernels[0], kernels[1])
    turn = tiny.turn(model=start(), state=algorithm.init_client(start()))
    upload, kept = algorithm.upload(turn, start(), jnp.zeros(()))
    assert set(kept) == {"params/fc/kernel", "params/fc/bias"}
    assert not set(kept) & set(upload)


@layered
def test_the_servers_copy_of_a_head_is_not_used(algorithm):
    data = tiny.dataset(SIZES)
    axis = parallel.build(np.array(SIZES), num_devices=1)
    program = tiny.rounds(axis, algorithm, local=LOCAL)
    state = program.initial_state(start(), KEY)
    broken = jax.tree.map(lambda leaf: leaf + jnp.nan, start().params["fc"])
    params = start().params | {"fc": broken}
    step = jax.jit(program.run)
    found, loss, _ = step(
        data, KEY, state.replace(model=start().replace(params=params)), 0
    )
    wanted, _, _ = step(data, KEY, state, 0)
    assert trees.all_finite((found.client, found.client_model, loss))
    same(found.client, wanted.client)


@layered
def test_bytes_are_those_of_the_other_layers(algorithm):
    program = algorithm.program(tiny.classifier(), LOCAL)
    client = trees.take(tiny.dataset(SIZES).client, 0)
    # A kernel of 3 x 3 x 4, and four of scale, shift, mean and variance.
    sent = 4 * (36 + 4 * 4)
    assert program.traffic(SHAPE, client) == Traffic(sent, sent)


def test_fedper_by_hand():
    """The mean of the others' layers, with the client's own last one."""
    layer = {"kernel": jnp.array([1.0])}
    old = ModelState({"conv": layer, "fc": {"kernel": jnp.array([2.0])}}, {})
    algorithm = algorithms.FedPer()
    own = algorithm.init_client(old)
    mean = {"params/conv/kernel": jnp.array([5.0])}
    _, model = algorithm.aggregate({}, old, mean, 1.0)
    received = algorithm.receive(model, {"params/fc/kernel": jnp.array([7.0])})
    assert received.params["conv"]["kernel"] == 5 and own["params/fc/kernel"] == 2
    assert received.params["fc"]["kernel"] == 7 and model.params["fc"]["kernel"] == 2


@pytest.mark.parametrize("layers", [("head",), ("conv", "bn", "fc"), ("f",)])
def test_layers_must_be_of_the_network(layers):
    with pytest.raises(errors.ConfigError, match="some, not all, of the network's: bn"):
        algorithms.FedPer(layers=layers).init_client(start())


def test_layers_must_be_names():
    with pytest.raises(errors.ConfigError, match="must be names of layers"):
        schema.check(algorithms.FedPer, {"layers": ()}, "methods.fedper")


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.6, 2), (0.99, 2)])
def test_fedrep_trains_heads_and_then_the_rest(share, count):
    algorithm = algorithms.FedRep(head_share=share)
    assert algorithm.head_steps(3) == count
    assert algorithm.head_steps(1) == 1  # else it would never be trained
    data = tiny.dataset(SIZES)
    client = trees.take(data.client, 1)
    program = algorithm.program(tiny.classifier(), LOCAL)
    turn = tiny.turn(model=start(), state=algorithm.init_client(start()))
    batch_at = training.client_batches(
        client, data.images, 0, 3, key=KEY, batch_size=8, augmentation="none"
    )
    carry = program.init(turn)
    for step in range(3):
        old, batch = carry[0], batch_at(step)
        carry, _ = program.step(turn, carry, batch, jnp.array(step))
        moves, stays = ("fc", "conv") if step < count else ("conv", "fc")
        same(carry[0].params[stays], old.params[stays])
        slope, _ = training.gradient(tiny.classifier(), old, batch)
        by_hand = jax.tree.map(
            lambda w, g: w - LOCAL.learning_rate * (g + LOCAL.weight_decay * w),
            old.params[moves],
            slope[moves],
        )
        close(carry[0].params[moves], by_hand)


def test_ditto_without_its_pull_is_local_training_beside_fedavg():
    state = run(algorithms.Ditto(pull=0.0))
    close(state.model, run(algorithms.FedAvg()).model)
    data = tiny.dataset(SIZES)
    alone = data.replace(client=trees.take(data.client, np.array([1])))
    own = run(algorithms.FedAvg(), data=alone).model
    close(trees.take(state.client, 1), own)
    assert trees.digest(algorithms.Ditto().personal_model(state.model, own)) == (
        trees.digest(own)
    )


def test_dittos_step_by_hand():
    """v - eta (g(v) + L2 v + lambda (v - w)), with the model received as w."""
    algorithm = algorithms.Ditto(pull=0.5)
    program = algorithm.program(tiny.classifier(), LOCAL)
    own = jax.tree.map(lambda leaf: leaf + 0.1, start())
    turn = tiny.turn(model=start(), state=own)
    data = tiny.dataset(SIZES)
    batch = training.client_batches(
        trees.take(data.client, 1),
        data.images,
        0,
        1,
        key=KEY,
        batch_size=8,
        augmentation="none",
    )(0)
    carry, _ = program.step(turn, program.init(turn), batch, jnp.array(0))
    result = program.final(turn, carry, jnp.zeros(()))
    slope, _ = training.gradient(tiny.classifier(), own, batch)
    by_hand = jax.tree.map(
        lambda v, g: v - 0.5 * (g + LOCAL.weight_decay * v + 0.5 * 0.1),
        own.params,
        slope,
    )
    close(result.state.params, by_hand)
    assert trees.digest(result.upload) != trees.digest(result.state)
