"""Clients with parts of the network: what they hold, train and send."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax import (
    aggregation,
    algorithms,
    errors,
    gan,
    parallel,
    prng,
    training,
    trees,
)
from mosaic_jax.classifier import Classifier
from mosaic_jax.models import dcgan, norm, resnet, submodel
from mosaic_jax.stages import generators, rounds
from mosaic_jax.types import ModelState
from tests import tiny
from tests.test_training import KEY, LOCAL, close

resnet.DEPTHS["two_blocks"] = ("basic", (1, 1))
resnet.DEPTHS["two_bottlenecks"] = ("bottleneck", (1, 1))

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


def program_of(algorithm, data, rates, classifier=CLASSIFIER, **layout):
    fields = {
        name: layout.pop(name)
        for name in ("clients_per_round", "keep_models")
        if name in layout
    }
    axis = parallel.build(np.asarray(data.client.size), **({"num_devices": 1} | layout))
    return rounds.Rounds(
        classifier=classifier,
        algorithm=algorithm,
        local=LOCAL,
        axis=axis,
        augmentation="none",
        **({"keep_models": True} | fields),
        rates=tuple(rates),
    )


def initial(classifier=CLASSIFIER):
    """A model whose every number differs from every other."""
    # From clones of the key: tests draw their models from it again and again.
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(jax.random.clone(KEY), (16, 16, 1))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.clone(KEY), len(leaves))
    noise = [
        jax.random.uniform(key, leaf.shape, minval=0.01, maxval=0.1)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(jnp.add, model, jax.tree.unflatten(structure, noise))


def run(algorithm, rates, count=1, sizes=SIZES, data=None, **layout):
    data = data or tiny.dataset(sizes)
    program = program_of(algorithm, data, rates, **layout)
    model = initial(program.classifier)
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


@pytest.mark.parametrize(
    ("width", "rate", "expected"),
    [(64, 0.0625, 4), (8, 0.0625, 1), (10, 0.1, 1), (10, 0.7, 7), (10, 0.71, 8)],
)
def test_kept_channels(width, rate, expected):
    assert submodel.kept(width, rate) == expected


def test_slice_of_two_blocks_by_hand():
    module, model = CLASSIFIER.module, initial()
    one, wide = np.array([2, 0]), np.array([7, 1, 4, 3])
    inner, second = np.array([1, 3]), np.array([0, 6, 5, 2])
    channels = {
        "stream1": one,
        "layer1_0/1": inner,
        "stream2": wide,
        "layer2_0/1": second,
    }
    assert module.widths == {
        "stream1": 4,
        "layer1_0/1": 4,
        "stream2": 8,
        "layer2_0/1": 8,
    }
    found = submodel.cut(model, module.spaces, channels)
    p, q = model.params, found.params
    same(q["conv1"]["kernel"], p["conv1"]["kernel"][..., one])
    same(q["bn1"], jax.tree.map(lambda x: x[one], p["bn1"]))
    for block, into, middle, out in (
        ("blocks_layer1_0", one, inner, one),
        ("blocks_layer2_0", one, second, wide),
    ):
        p, q = model.params[block], found.params[block]
        kernel = p["conv1"]["kernel"][:, :, into][..., middle]
        same(q["conv1"]["kernel"], kernel)
        same(q["bn1"]["scale"], p["bn1"]["scale"][middle])
        same(q["conv2"]["kernel"], p["conv2"]["kernel"][:, :, middle][..., out])
        same(q["bn2"]["bias"], p["bn2"]["bias"][out])
        statistics = model.batch_stats[block], found.batch_stats[block]
        same(statistics[1]["bn2"]["var"], statistics[0]["bn2"]["var"][out])
    kernel = p["shortcut_conv"]["kernel"][:, :, one][..., wide]
    same(q["shortcut_conv"]["kernel"], kernel)
    same(found.params["fc"]["kernel"], model.params["fc"]["kernel"][wide])
    same(found.params["fc"]["bias"], model.params["fc"]["bias"])


@pytest.mark.parametrize("depth", ["two_blocks", "two_bottlenecks"])
@pytest.mark.parametrize("rate", [0.5, 0.3])
def test_a_narrow_network_among_zeros_is_the_same_function(depth, rate):
    module = resnet.ResNet(4, depth, 4)
    wide = dataclasses.replace(CLASSIFIER, module=module)
    narrow = dataclasses.replace(CLASSIFIER, module=module.clone(rate=rate))
    model, channels = initial(wide), indices(rate, module.widths)
    part = submodel.cut(model, module.spaces, channels)
    shapes = jax.eval_shape(lambda: narrow.init(prng.named(KEY, "narrow"), (16, 16, 1)))
    assert jax.tree.map(jnp.shape, part) == jax.tree.map(jnp.shape, shapes)
    whole = submodel.paste(part, module.spaces, channels, module.widths)
    image = jax.random.uniform(prng.named(KEY, "image"), (5, 16, 16, 1), minval=-1)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(classifier, model):
        def loss(params):
            changed = model.replace(params=params)
            logits, statistics = classifier.train_logits(changed, image)
            return jnp.sum(logits**2), (logits, statistics)

        gradient, trained = jax.grad(loss, has_aux=True)(model.params)
        return classifier.logits(model, image), trained, gradient

    one, other = everything(narrow, part), everything(wide, whole)
    close((one[0], one[1][0]), (other[0], other[1][0]))
    one, other = (
        ModelState(gradient, statistics)
        for _, (_, statistics), gradient in (one, other)
    )
    # Outside of the part gradients and statistics are zero, too: they stay so.
    close(submodel.paste(one, module.spaces, channels, module.widths), other)


def test_cut_then_paste_keeps_what_is_held_and_nothing_else():
    module, model = CLASSIFIER.module, initial()
    channels = indices(0.5, module.widths)
    part = submodel.cut(model, module.spaces, channels)
    whole = submodel.paste(part, module.spaces, channels, module.widths)
    masks = submodel.masks(channels, module.widths)
    share = submodel.held(model, module.spaces, masks)
    same(whole, submodel.within(model, share))
    kept = submodel.merge(
        submodel.Part(whole, share), jax.tree.map(jnp.zeros_like, model)
    )
    same(kept, whole)
    untouched = submodel.merge(submodel.Part(whole, share), model)
    same(untouched, model)


@ALL
def test_all_rates_one_is_fedavg_bit_for_bit(algorithm):
    data = tiny.dataset(SIZES)
    found = run(algorithm, [1.0] * 4, 2, data=data)[2]
    expected = run(algorithms.FedAvg(), [], 2, data=data)[2]
    same(found.model, expected.model)
    same(found.client_model, expected.client_model)


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
    merged = program.finish(program.initial_state(model, KEY), mean, (), KEY, 0)[
        0
    ].model
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


def test_mean_over_holders_by_hand():
    shares = [jnp.ones((4, 4)), jnp.zeros((4, 4)).at[:2, :2].set(1.0)]
    values = [jnp.full((4, 4), 2.0), 4.0 * shares[1]]
    part = submodel.Part(
        {"w": 0.5 * values[0] + 0.5 * values[1]},
        {"w": 0.5 * shares[0] + 0.5 * shares[1]},
    )
    found = submodel.merge(part, {"w": jnp.zeros((4, 4))})["w"]
    expected = np.full((4, 4), 2.0)
    expected[:2, :2] = 3.0
    np.testing.assert_array_equal(found, expected)


@ALL
@pytest.mark.parametrize("number", [0, 5])
def test_a_client_changes_nothing_outside_of_its_part(algorithm, number):
    data = tiny.dataset([10])
    program = program_of(algorithm, data, [0.5])
    model = initial()
    state = program.initial_state(model, KEY)
    after = jax.jit(functools.partial(program.run, data, KEY))(state, number)[0].model
    share = program.parts.share_of_all(model, data.client, KEY, jnp.array([number]))
    outside = jax.tree.map(lambda one: 1 - one[0], share)
    same(submodel.within(after, outside), submodel.within(model, outside))
    inside = jax.tree.map(
        lambda new, old, one: jnp.all((new != old) | (one[0] == 0)), after, model, share
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
        found = program.parts.channels(KEY, jnp.array(number), jnp.array(client), 0.5)
        return {space: tuple(index.tolist()) for space, index in found.items()}

    assert held(0, 0) == held(0, 0)
    assert held(0, 0) != held(1, 0)
    assert held(0, 0) != held(0, 1)
    # One set per stream is what ties blocks and shortcut.
    assert set(held(0, 0)) == set(CLASSIFIER.module.widths)


@ALL
@pytest.mark.parametrize(
    "layout", [{"at_once": 1}, {"at_once": 4}, {"at_once": 1, "num_devices": 2}]
)
def test_batched_equals_each_client_alone(algorithm, layout):
    data, rates = tiny.dataset(SIZES), [1.0, 0.5, 0.5, 0.3]
    program, model, state, _ = run(algorithm, rates, data=data, **layout)
    for i, rate in enumerate(rates):
        client = trees.take(data.client, i)
        channels = program.parts.channels(KEY, jnp.array(0), jnp.array(i), rate)
        spaces, widths = CLASSIFIER.module.spaces, CLASSIFIER.module.widths
        trained, _ = jax.jit(
            functools.partial(program._train, program.parts.classifier_of(rate))
        )(
            client,
            {},
            submodel.cut(model, spaces, channels),
            data.images,
            KEY,
            jnp.array(0),
        )
        alone = submodel.paste(trained, spaces, channels, widths)
        close(trees.take(state.client_model, i), alone)


def test_host_memory_and_some_clients_change_nothing():
    data, rates = tiny.dataset([10, 19, 8, 5, 9, 4]), [1.0, 0.5] * 3
    layout = {"clients_per_round": 4, "at_once": 1}
    program, model, expected, _ = run(HETEROFL, rates, 2, data=data, **layout)
    assert program.counts == [2, 2]
    state = program.initial_state(model, KEY)
    state = state.replace(client_model=jax.tree.map(np.array, state.client_model))
    on_host = rounds.HostRounds(program)
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
    assert program.parts.classifier_of(1.0).module.scale == 1.0
    assert program.parts.classifier_of(0.5).module.scale == 2.0
    model = submodel.cut(
        initial(), CLASSIFIER.module.spaces, indices(0.5, CLASSIFIER.module.widths)
    )
    image = jax.random.normal(prng.named(KEY, "image"), (4, 16, 16, 1))
    narrow = program.parts.classifier_of(0.5)
    plain = program.parts.classifier_of(0.5, scaled=False)
    assert plain.module.scale == 1.0
    # Batch-norm undoes it but for epsilon; running statistics are of what was not.
    (logits, found), (expected, statistics) = (
        each.train_logits(model, image) for each in (narrow, plain)
    )
    close(logits, expected, rtol=2e-2)
    close(found["bn1"], statistics["bn1"])
    close(narrow.logits(model, image), plain.logits(model, image))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_statistics_are_asked_of_the_clients(rate):
    """By hand: each client's moments over its batches, weighted by its images."""
    data = tiny.dataset(SIZES)
    program = program_of(HETEROFL, data, [1.0, 0.5, 0.5, 0.5])
    classifier = program.parts.classifier_of(rate, scaled=False)
    spaces, widths = CLASSIFIER.module.spaces, CLASSIFIER.module.widths
    model = (
        initial()
        if rate == 1
        else submodel.cut(initial(), spaces, indices(rate, widths))
    )
    weight = jnp.array([0.0, 2.0, 1.0, 1.0])
    found = jax.jit(program.queried, static_argnums=4)(data, KEY, model, weight, rate)
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
    assert running.settled(data, KEY, model) is model
    static = dataclasses.replace(HETEROFL, batch_norm="static")
    asked = program_of(static, data, [0.5] * 4).settled(data, KEY, model)
    assert trees.digest(asked.batch_stats) != trees.digest(model.batch_stats)


def test_static_statistics_are_the_mean_over_batches():
    old, batches = jnp.array(7.0), [1.0, 2.0, 6.0]
    found = old
    for step, batch in enumerate(batches):
        blended = norm.BatchNorm.decay * found + (1 - norm.BatchNorm.decay) * batch
        found = norm.cumulative(found, blended, step)
    assert float(found) == pytest.approx(3.0, rel=1e-5)
    static = dataclasses.replace(HETEROFL, batch_norm="static")
    running, expected = jnp.array(2.0), jnp.array(5.0)
    assert HETEROFL.batch_stats(running, expected, 3) == expected
    assert static.batch_stats(running, expected, 0) != expected


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
    logits = masked.logits(jnp.ones((2, 4)), present[0], 0)
    np.testing.assert_array_equal(logits, [[1, 1, 0, 0]] * 2)


def test_uniform_weights():
    uniform = dataclasses.replace(HETEROFL, weighting="uniform")
    _, _, state, _ = run(uniform, [1.0] * 2, sizes=[10, 19])
    close(state.model, jax.tree.map(lambda x: jnp.mean(x, 0), state.client_model))


def test_experts_average_over_those_who_hold_a_parameter():
    full, half = jnp.full(4, 2.0), jnp.array([6.0, 6.0, 0.0, 0.0])
    client = ModelState({"w": jnp.stack([full, half, half])}, {})
    share = ModelState({"w": jnp.stack([jnp.ones(4), half / 6, half / 6])}, {})
    count = jnp.array([[1, 0, 0], [3, 1, 0], [0, 1, 0]])
    model = ModelState({"w": jnp.full(4, 9.0)}, {})
    found = aggregation.class_experts(client, count, model, share)
    expected = [[5, 5, 2, 2], [6, 6, 9, 9], [9, 9, 9, 9]]
    np.testing.assert_allclose(found.model.params["w"], expected, rtol=1e-6)
    assert found.present.tolist() == [True, True, False]


def test_a_generator_of_half_the_width_among_zeros_trains_as_one():
    fields = {
        "classifier": tiny.classifier(),
        "tx": optax.adam(1e-3, b1=0.5),
        "latent_dim": 5,
        "entropy_weight": 0.1,
        "diversity_weight": 1.0,
        "inversion_weight": 0.1,
        "classifier_train_mode": False,
        "normalised_range": False,
        "ema_decay": 0.5,
        "translate": 0,
    }
    wide, narrow = (
        gan.Gan(
            generator=dcgan.Generator(16, 1, width),
            discriminator=dcgan.Discriminator(16, width),
            **fields,
        )
        for width in (4, 2)
    )
    state = trees.broadcast(wide.init(prng.named(KEY, "wide"), (16, 16, 1)), 1)
    state = trees.take(generators._narrow(wide, state, [0.5]), 0)

    def first_half(module, model):
        channels = {
            space: jnp.arange(width // 2) for space, width in module.widths.items()
        }
        return submodel.cut(model, module.spaces, channels)

    generator = first_half(wide.generator, state.generator)
    discriminator = first_half(wide.discriminator, state.discriminator)
    small = narrow.init(prng.named(KEY, "narrow"), (16, 16, 1)).replace(
        generator=generator, discriminator=discriminator, average=generator
    )
    classifier = wide.classifier.init(prng.named(KEY, "classifier"), (16, 16, 1))
    image = jax.random.uniform(prng.named(KEY, "image"), (4, 16, 16, 1), minval=-1)

    def train(each, state):
        @jax.jit
        def step(state, number):
            return each.step(
                state,
                prng.at(KEY, number),
                image,
                jnp.ones(4, bool),
                client_model=classifier,
                class_share=jnp.full(4, 0.25),
                inverts=jnp.array(True),
                statistics=classifier,
            )[0]

        for number in range(3):
            state = step(state, number)
        return state

    state, small = train(wide, state), train(narrow, small)
    close(first_half(wide.generator, state.generator), small.generator, 1e-4)
    close(
        first_half(wide.discriminator, state.discriminator), small.discriminator, 1e-4
    )
    count = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(state.generator))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(small.generator))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rates": (1.0, 0.5)}, [1, 0.5, 1, 0.5, 1, 0.5, 1, 0.5, 1, 0.5]),
        (
            {"rule": "shares", "rates": (1, 0.25), "shares": (0.3, 0.7)},
            [1] * 3 + [0.25] * 7,
        ),
        (
            {"rule": "formula", "rho": 5.0, "sigma": 4},
            [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625, 0.0625],
        ),
        ({"rule": "formula", "rho": 10.0}, [0.5, 0.25, 0.125] + [0.0625] * 7),
        ({"rule": "formula", "rho": 40.0}, [0.0625] * 10),
    ],
)
def test_budgets(fields, expected):
    changes = {f"budgets__{name}": value for name, value in fields.items()}
    budgets = tiny.study(**changes).budgets
    assert list(budgets.of_clients(10)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"budgets__rates": (1.0, 0.0)},
            "budgets.rates = (1.0, 0.0): must be numbers in (0, 1], at least one",
        ),
        (
            {"budgets__rule": "shares", "budgets__shares": (1.0,)},
            "budgets.shares = (1.0,): must be 5 numbers, one for each of budgets.rates,"
            " and not all 0",
        ),
        (
            {"budgets__rule": "random"},
            "budgets.rule = 'random': must be one of list, shares, formula",
        ),
    ],
)
def test_wrong_budgets(changes, expected):
    with pytest.raises(errors.ConfigError) as error:
        tiny.study(**changes)
    assert str(error.value) == expected
