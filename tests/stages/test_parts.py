"""Clients with parts of the network: what they hold, train and send."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.fl import algorithms, client_program, parallel, training
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import LocalSGD, Seen
from mosaic_jax.nn import norm, resnet, submodel
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.host_rounds import HostRounds
from tests import tiny

resnet.DEPTHS["two_blocks"] = ("basic", (1, 1))

KEY = prng.root(0)
SIZES = [10, 19, 8, 5]
FIELDS = {
    "batch_norm": "running",
    "scaler": False,
    "weighting": "size",
    "masked_loss": False,
}
HETEROFL = algorithms.HeteroFL(**FIELDS)
FEDROLEX = algorithms.FedRolex(**FIELDS)
FEDDROPOUT = algorithms.FedDropout(**FIELDS)
ALL = pytest.mark.parametrize(
    "algorithm",
    [HETEROFL, FEDROLEX, FEDDROPOUT],
    ids=["heterofl", "fedrolex", "feddropout"],
)
CLASSIFIER = Classifier(resnet.ResNet(4, "two_blocks", 4), (0.4,), (0.3,))


def program_of(algorithm, data, rates, **layout):
    fields = {
        name: layout.pop(name)
        for name in ("clients_per_round", "keep_models")
        if name in layout
    }
    axis = parallel.build(np.asarray(data.client.size), **({"num_devices": 1} | layout))
    return tiny.rounds(axis, algorithm, CLASSIFIER, rates, **fields)


def initial():
    return tiny.varied(CLASSIFIER, KEY)


def close(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b
    )


def run(algorithm, rates, count=1, sizes=SIZES, data=None, **layout):
    data = data or tiny.dataset(sizes)
    program = program_of(algorithm, data, rates, **layout)
    model = initial()
    state = program.initial_state(model, KEY)
    placed = program.axis.place(data, whole=True)
    step = jax.jit(functools.partial(program.run, placed, KEY))
    for number in range(count):
        state, loss, _ = step(state, number)
    return program, model, state, loss


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def indices(rate, widths, seed=0):
    np_rng = np.random.RandomState(seed)
    return {
        space: jnp.asarray(np_rng.permutation(width)[: submodel.kept(width, rate)])
        for space, width in widths.items()
    }


@pytest.mark.slow
def test_all_rates_one_is_fedavg():
    """Of the algorithm that draws channels: nobody is asked which ones at rate 1."""
    data = tiny.dataset(SIZES)
    found = run(FEDDROPOUT, [1.0] * 4, 2, data=data)[2]
    expected = run(algorithms.FedAvg(), [], 2, data=data)[2]
    close(found.model, expected.model)
    close(found.client_model, expected.client_model)


def test_one_client_at_rate_one_is_put_back_as_it_is():
    _, _, state, _ = run(HETEROFL, [1.0], sizes=[10])
    same(state.model, trees.take(state.client_model, 0))


def test_disjoint_halves_are_joined():
    data = tiny.dataset([10, 10])
    program = program_of(HETEROFL, data, [0.5, 0.5])
    module, model = CLASSIFIER.module, initial()
    parts = []
    for half in range(2):
        channels = {
            space: half * width // 2 + jnp.arange(width // 2)
            for space, width in module.widths.items()
        }
        masks = submodel.masks(channels, module.widths)
        share = submodel.held(model, module.spaces, masks)
        value = jax.tree.map(lambda x, h=half: jnp.full_like(x, 2.0 + h), model)
        parts.append(submodel.Part(submodel.within(value, share), share))
    mean = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, *parts)
    turnout = program.participation.turnout(data.client, KEY, 0)
    state = program.initial_state(model, KEY)
    merged = program.finish(state, mean, (), KEY, 0, turnout)[0].model
    kernel = merged.params["blocks_layer2_0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel[..., :4, :4], 2.0)
    np.testing.assert_array_equal(kernel[..., 4:, 4:], 3.0)
    # Nobody holds weights between the halves.
    old = model.params["blocks_layer2_0"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel[..., :4, 4:], old[..., :4, 4:])
    scale = merged.params["blocks_layer2_0"]["bn2"]["scale"]
    np.testing.assert_array_equal(scale, [2.0] * 4 + [3.0] * 4)
    # Both hold the classifier's bias.
    np.testing.assert_array_equal(merged.params["fc"]["bias"], 2.5)


@ALL
@pytest.mark.slow
def test_a_client_changes_nothing_outside_of_its_part(algorithm):
    data = tiny.dataset([10])
    program = program_of(algorithm, data, [0.5])
    model = initial()
    state = program.initial_state(model, KEY)
    step = jax.jit(functools.partial(program.run, data, KEY))
    for number in (0, 5):
        after = step(state, jnp.array(number))[0].model
        share = program.holdings.masks(model, data.client, KEY, jnp.array([number]))
        outside = jax.tree.map(lambda one: 1 - one[0], share)
        same(submodel.within(after, outside), submodel.within(model, outside))
        inside = jax.tree.map(
            lambda new, old, one: jnp.all((new != old) | (one[0] == 0)),
            after,
            model,
            share,
        )
        for layer in ("conv1", "blocks_layer2_0", "fc"):
            assert jax.tree.all(inside.params[layer])


def test_window_covers_every_channel_equally_often():
    for width, rate in ((8, 0.5), (8, 0.3), (10, 0.0625)):
        kept = submodel.kept(width, rate)
        count = np.zeros(width)
        for number in range(width):
            held = np.asarray(FEDROLEX.channels(KEY, jnp.array(number), width, kept))
            assert len(set(held.tolist())) == kept
            count[held] += 1
        np.testing.assert_array_equal(count, kept)


def test_first_channels_are_nested():
    found = [set(HETEROFL.channels(KEY, 3, 64, kept).tolist()) for kept in (4, 8, 64)]
    assert found[0] < found[1] < found[2] == set(range(64))


def test_random_channels_change_with_client_and_round_and_are_tied():
    data = tiny.dataset(SIZES)
    program = program_of(FEDDROPOUT, data, [0.5] * 4)

    def held(number, client):
        found = program.holdings.channels(
            KEY, jnp.array(number), jnp.array(client), 0.5
        )
        return {space: tuple(index.tolist()) for space, index in found.items()}

    assert held(0, 0) == held(0, 0)
    assert held(0, 0) != held(1, 0)
    assert held(0, 0) != held(0, 1)
    # One set per stream is what ties blocks and shortcut.
    assert set(held(0, 0)) == set(CLASSIFIER.module.widths)


@functools.partial(jax.jit, static_argnums=0)
def trained(program, client, model, images):
    """A client's turn in round 0."""
    local, number = tiny.LOCAL, jnp.array(0)
    batch_at = training.client_batches(
        client,
        images,
        0,
        local.steps,
        key=KEY,
        batch_size=local.batch_size,
        augmentation="none",
    )
    turn = Turn(model, {}, client, {}, number, KEY, tiny.LOCAL)
    return client_program.run(program, turn, batch_at, local.steps)


@pytest.mark.parametrize(
    ("algorithm", "layout"),
    [
        pytest.param(HETEROFL, {"at_once": 1}, marks=pytest.mark.slow),
        pytest.param(FEDROLEX, {"at_once": 4}, marks=pytest.mark.slow),
        (FEDDROPOUT, {"at_once": 1, "num_devices": 2}),
    ],
    ids=["heterofl", "fedrolex", "feddropout"],
)
@pytest.mark.slow
def test_batched_equals_each_client_alone(algorithm, layout):
    data, rates = tiny.dataset(SIZES), [1.0, 0.5, 0.5, 0.3]
    program, model, state, _ = run(algorithm, rates, data=data, **layout)
    for i, rate in enumerate(rates):
        client = trees.take(data.client, i)
        channels = program.holdings.channels(KEY, jnp.array(0), jnp.array(i), rate)
        spaces, widths = CLASSIFIER.module.spaces, CLASSIFIER.module.widths
        narrow = LocalSGD(
            program.holdings.classifier_of(rate), algorithm, program.local
        )
        part = submodel.cut(model, spaces, channels)
        result, _ = trained(narrow, client, part, data.images)
        alone = submodel.paste(result.model, spaces, channels, widths)
        close(trees.take(state.client_model, i), alone)


@pytest.mark.slow
def test_host_memory_and_some_clients_change_nothing():
    data, rates = tiny.dataset([10, 19, 8, 5, 9, 4]), [1.0, 0.5] * 3
    layout = {"clients_per_round": 4, "at_once": 1}
    program, model, expected, _ = run(HETEROFL, rates, 2, data=data, **layout)
    assert program.participation.counts == [2, 2]
    state = program.initial_state(model, KEY)
    state = state.replace(client_model=jax.tree.map(np.array, state.client_model))
    on_host = HostRounds(program)
    for number in range(2):
        state, _, _ = on_host.run(data, KEY, state, number)
    close(state, expected)


def test_every_rate_takes_part():
    data = tiny.dataset([10, 19, 8, 5])
    with pytest.raises(errors.ConfigError) as error:
        program_of(HETEROFL, data, [1.0, 1.0, 1.0, 0.5], clients_per_round=1)
    assert str(error.value) == (
        "init.clients_per_round = 1: must be larger: no client of rate 0.5 would take"
        " part"
    )


def test_scaler_is_one_at_rate_one_and_undoes_the_rate():
    scaled = dataclasses.replace(HETEROFL, scaler=True)
    program = program_of(scaled, tiny.dataset(SIZES), [1.0, 0.5, 0.5, 0.5])
    assert program.holdings.classifier_of(1.0).module.scale == 1.0
    assert program.holdings.classifier_of(0.5).module.scale == 2.0
    model = submodel.cut(
        initial(), CLASSIFIER.module.spaces, indices(0.5, CLASSIFIER.module.widths)
    )
    image = jax.random.normal(prng.named(KEY, "image"), (4, 16, 16, 1))
    narrow = program.holdings.classifier_of(0.5)
    plain = program.holdings.classifier_of(0.5, scaled=False)
    assert plain.module.scale == 1.0
    # Batch-norm undoes it but for epsilon; running statistics are of what was not.
    (logits, found), (expected, statistics) = (
        each.train_logits(model, image) for each in (narrow, plain)
    )
    close(logits, expected, rtol=2e-2)
    close(found["bn1"], statistics["bn1"])
    close(narrow.logits(model, image), plain.logits(model, image))


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.slow
def test_statistics_are_asked_of_the_clients(rate):
    """By hand: each client's moments over its batches, weighted by its images."""
    data = tiny.dataset(SIZES)
    program = program_of(HETEROFL, data, [1.0, 0.5, 0.5, 0.5])
    classifier = program.holdings.classifier_of(rate, scaled=False)
    spaces, widths = CLASSIFIER.module.spaces, CLASSIFIER.module.widths
    model = (
        initial()
        if rate == 1
        else submodel.cut(initial(), spaces, indices(rate, widths))
    )
    weight = jnp.array([0.0, 2.0, 1.0, 1.0])
    found = jax.jit(program.recalibrate_batch_norm, static_argnums=4)(
        data, KEY, model, weight, rate
    )
    means, variances = [], []
    for i in range(4):
        client, each = jax.tree.map(lambda leaf, i=i: leaf[i], data.client), []
        batch_at = training.client_batches(
            client,
            data.images,
            0,
            program.local.steps,
            key=KEY,
            batch_size=program.local.batch_size,
            augmentation=program.augmentation,
        )
        for step in range(program.local.steps):
            batch = batch_at(step)
            _, after = classifier.train_logits(model, batch.image, batch.mask)
            before = model.batch_stats["bn1"]
            each.append(
                jax.tree.map(lambda a, b: (b - 0.9 * a) / 0.1, before, after["bn1"])
            )
        means.append(np.mean([one["mean"] for one in each], axis=0))
        variances.append(np.mean([one["var"] for one in each], axis=0))
    share = np.asarray(weight) / 4
    close(found.batch_stats["bn1"]["mean"], share @ np.stack(means), rtol=1e-4)
    close(found.batch_stats["bn1"]["var"], share @ np.stack(variances), rtol=1e-4)
    assert trees.digest(found.params) == trees.digest(model.params)


def test_only_static_batch_norm_asks():
    data = tiny.dataset(SIZES)
    model = initial()
    running = program_of(HETEROFL, data, [0.5] * 4)
    assert running.usable(data, KEY, model) is model
    static = dataclasses.replace(HETEROFL, batch_norm="static")
    asked = program_of(static, data, [0.5] * 4).usable(data, KEY, model)
    assert trees.digest(asked.batch_stats) != trees.digest(model.batch_stats)


def test_static_statistics_are_the_mean_over_batches():
    old, batches = jnp.array(7.0), [1.0, 2.0, 6.0]
    found = old
    for step, batch in enumerate(batches):
        blended = norm.BatchNorm.decay * found + (1 - norm.BatchNorm.decay) * batch
        found = norm.cumulative(found, blended, step)
    assert float(found) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("batch_norm", ["static", "running"])
def test_a_client_trains_its_statistics_as_the_setting_says(batch_norm):
    """Two steps, whose batches' moments the plain program tells one by one."""
    algorithm = dataclasses.replace(HETEROFL, batch_norm=batch_norm)
    data = tiny.dataset([10])
    holdings = program_of(algorithm, data, [1.0]).holdings
    client, model = trees.take(data.client, 0), initial()
    program = holdings.program(1.0, tiny.LOCAL)
    turn = Turn(model, {}, client, {}, jnp.array(0), KEY, tiny.LOCAL)
    batch_at = training.client_batches(
        client, data.images, 0, 2, key=KEY, batch_size=8, augmentation="none"
    )
    carry, moments = program.init(turn), []
    step = jax.jit(program.step)
    for number in range(2):
        before, batch = carry[0], batch_at(number)
        _, blended = CLASSIFIER.train_logits(before, batch.image, batch.mask)
        old = before.batch_stats["bn1"]["mean"]
        moments.append((blended["bn1"]["mean"] - 0.9 * old) / 0.1)
        carry, _ = step(turn, carry, batch, number)
    found, start = carry[0].batch_stats["bn1"]["mean"], model.batch_stats["bn1"]["mean"]
    running = 0.9 * (0.9 * start + 0.1 * moments[0]) + 0.1 * moments[1]
    expected = {"static": (moments[0] + moments[1]) / 2, "running": running}
    close(found, expected[batch_norm], rtol=1e-4)


@pytest.mark.slow
def test_masked_loss_leaves_rows_of_absent_classes_alone():
    masked = dataclasses.replace(HETEROFL, masked_loss=True)
    data = tiny.dataset([10, 10])
    present = jnp.array([[5, 5, 0, 0], [0, 5, 5, 0]])
    label = jnp.array([0, 1] * 5 + [1, 2] * 5)
    data = data.replace(
        images=data.images.replace(label=label),
        client=data.client.replace(label_count=present),
    )
    _, model, state, _ = run(masked, [1.0, 0.5], data=data)
    old, new = (m.params["fc"]["bias"] for m in (model, state.model))
    clients = state.client_model.params["fc"]["bias"]
    # Class 0 is client 0's alone, 1 is both's, 2 is client 1's, 3 nobody's.
    close(new[0], clients[0, 0])
    close(new[1], clients[:, 1].mean())
    close(new[2], clients[1, 2])
    assert new[3] == old[3]
    turn = Turn(
        model, {}, trees.take(data.client, 0), {}, jnp.array(0), KEY, tiny.LOCAL
    )
    seen = Seen(turn, None, None, jnp.array(0), KEY, None)
    logits = masked.logits(jnp.ones((2, 4)), seen)
    np.testing.assert_array_equal(logits, [[1, 1, 0, 0]] * 2)


def test_uniform_weights():
    uniform = dataclasses.replace(HETEROFL, weighting="uniform")
    _, _, state, _ = run(uniform, [1.0] * 2, sizes=[10, 19])
    close(state.model, jax.tree.map(lambda x: jnp.mean(x, 0), state.client_model))
