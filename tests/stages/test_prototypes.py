"""Prototypes: each expert's logits on them, one expert's features at a time."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import ClientModels, Experts
from mosaic_jax.fl import parallel
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn import submodel
from mosaic_jax.stages import federation, prototypes
from tests import running, tiny

KEY = prng.root(0)
SIZES = [5, 30, 12]
SHAPE = (16, 16, 1)


def context_of(num_classes, sizes=SIZES, **changes):
    axis = parallel.build(np.array(sizes), at_once=1, num_devices=1)
    data = tiny.dataset(sizes, num_classes)
    info = types.SimpleNamespace(num_classes=num_classes, image_shape=SHAPE)
    context = types.SimpleNamespace(
        settings=tiny.study(**changes),
        axis=axis,
        clients=data,
        data=types.SimpleNamespace(info=info),
        networks={"net": tiny.classifier(num_classes)},
        name="net",
        classifier=tiny.classifier(num_classes),
        rates=(),
        key=KEY,
        mechanism=None,
    )
    context.for_network = lambda name: context
    return context


def models(context, count):
    init = jax.jit(jax.vmap(lambda i: context.classifier.init(prng.at(KEY, i), SHAPE)))
    return init(jnp.arange(count))


@pytest.mark.parametrize("space", ["expert", "client", "global"])
@pytest.mark.slow
def test_an_expert_reads_the_mean_of_the_members_in_its_own_features(space):
    context = context_of(4, prototypes__space=space)
    own, found, model = models(context, 3), models(context, 4), models(context, 1)
    model = trees.take(model, 0)
    trained = ClientModels(own, jnp.zeros(3, jnp.int32))
    run = context.settings.prototypes.run(
        context,
        global_model=model,
        client_models=trained,
        experts=Experts(found, jnp.ones(4, bool)),
    )
    result = running.drive(run).artifacts["prototypes"]
    features = jax.jit(context.classifier.features)
    head = jax.jit(context.classifier.head)
    data = context.clients
    run = jax.jit(functools.partial(prototypes.cluster_images, context))
    clustered_by = own if space != "global" else trees.broadcast(model, 3)
    cluster, held, _ = run(data, clustered_by, None, KEY)
    rows = list(zip(*np.nonzero(held), strict=True))
    assert len(rows) == len(result.label) > 12
    for p, (i, k, j) in enumerate(rows):
        assert (result.client[p], result.label[p]) == (i, k)
        index = data.client.index[i][: SIZES[i]]
        member = (np.asarray(cluster[i])[: SIZES[i]] == j) & (
            np.asarray(data.images.label)[index] == k
        )
        assert member.any()
        image = data.images.image[index[member]] / 127.5 - 1
        for e in range(4):
            expert = trees.take(found, e)
            reader = {"expert": expert, "client": trees.take(own, i), "global": model}
            centre = jnp.mean(features(reader[space], image), axis=0)
            np.testing.assert_allclose(
                result.logits[p, e], head(expert, centre[None])[0], atol=1e-4
            )
        gate = head(model, jnp.mean(features(model, image), axis=0)[None])[0]
        np.testing.assert_allclose(result.gate_logits[p], gate, atol=1e-4)


# Of `tiny.Net` for grey images and five classes, in float32: a 3 x 3 kernel of four
# channels; scale, shift, mean and variance; a linear layer with bias.
MODEL = 4 * (3 * 3 * 4 + 4 * 4 + 4 * 5 + 5)


def run_stage(context, experts):
    """The stage's outcome, of `experts` [5, ...] of each network by name."""
    first, *others = experts
    present, trained = jnp.ones(5, bool), jnp.zeros(3, jnp.int32)
    own = ClientModels(models(context, 3), trained)
    given = {"experts": Experts(experts[first], present), "client_models": own}
    for name in others:
        given[f"experts@{name}"] = Experts(experts[name], present)
        given[f"client_models@{name}"] = own
    model = trees.take(models(context, 1), 0)
    stage = context.settings.prototypes
    return running.drive(stage.run(context, global_model=model, **given))


@pytest.mark.parametrize(
    ("space", "features", "down"),
    [
        ("expert", 5 * 4, {"experts": 3 * 5 * MODEL}),
        ("client", 4, {}),
        ("global", 4, {}),
    ],
)
def test_bytes_by_hand(space, features, down):
    """Features of a prototype in float32, in each expert's or in one model's, and its
    label; in the experts' features clients receive all experts."""
    context = context_of(5, prototypes__space=space)
    outcome = run_stage(context, {"net": models(context, 5)})
    count = len(outcome.artifacts["prototypes"].label)
    assert outcome.results == {"num_prototypes": count}
    assert outcome.up == {"prototypes": count * (4 * features + 4)}
    assert outcome.down == down


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(space, marks=[pytest.mark.slow] * (space != "client"))
        for space in ("expert", "client", "global")
    ],
)
def test_private_prototypes_without_noise_and_clip_are_the_means_of_classes(space):
    context = context_of(5, prototypes__space=space, prototypes__clusters=1)
    experts = {"net": models(context, 5)}
    plain = run_stage(context, experts)
    client = context.clients.client.replace(noise=jnp.zeros(3, jnp.float32))
    context.clients = context.clients.replace(client=client)
    context.mechanism = Mechanism(1e9, 1e9, ())
    hidden = run_stage(context, experts)
    tiny.close(hidden.artifacts["prototypes"], plain.artifacts["prototypes"])
    assert (hidden.up, hidden.down) == (plain.up, plain.down)
    # The same image is told of in each space, by noise of its own.
    noise = jnp.full(3, 0.1 / 1e9, jnp.float32)
    context.clients = context.clients.replace(client=client.replace(noise=noise))
    found = run_stage(context, experts).artifacts["prototypes"].logits
    assert np.abs(found - plain.artifacts["prototypes"].logits).min(axis=0).all()


def half_of_norm(model):
    """The mask of three clients that hold two of four channels of the batch-norm."""
    ones = jax.tree.map(lambda leaf: jnp.ones([1] * leaf.ndim), model)
    half = jnp.array([1.0, 1.0, 0.0, 0.0])
    mask = ones.replace(
        params=ones.params | {"bn": jax.tree.map(lambda _: half, ones.params["bn"])}
    )
    return trees.broadcast(mask, 3)


def test_clients_of_part_of_the_network_receive_that_part_of_experts(monkeypatch):
    context = context_of(5, prototypes__space="expert")
    mask = half_of_norm(trees.take(models(context, 1), 0))
    context.rates = (0.5,) * 3
    monkeypatch.setattr(federation, "trained_masks", lambda *_: mask)
    outcome = run_stage(context, {"net": models(context, 5)})
    # Two numbers each of scale and shift are left out.
    assert outcome.down == {"experts": 3 * 5 * (MODEL - 4 * 2 * 2)}


def test_experts_of_two_networks_stand_side_by_side():
    """Here the same clients have both: each prototype is made twice."""
    context = context_of(
        5, prototypes__space="expert", model__name="cnn", model__others=("resnet18",)
    )
    one, other = models(context, 5), models(context, 5)
    other = jax.tree.map(lambda leaf: 1.5 * leaf, other)
    network, context.name = context.classifier, "cnn"
    context.networks = {"cnn": network, "resnet18": network}
    both = run_stage(context, {"cnn": one, "resnet18": other})
    context.networks = {"cnn": network}
    context.settings = tiny.study(prototypes__space="expert")
    alone = [
        run_stage(context, {"cnn": experts}).artifacts["prototypes"].logits
        for experts in (one, other)
    ]
    assert not np.allclose(*alone)
    count, found = len(alone[0]), both.artifacts["prototypes"].logits
    for part in (found[:count], found[count:]):
        np.testing.assert_array_equal(part, np.concatenate(alone, axis=1))
    assert both.down == {"experts": 2 * 3 * 2 * 5 * MODEL}
    assert both.up == {"prototypes": 2 * count * (4 * (2 * 5 * 4) + 4)}


def test_clients_of_part_of_the_network_send_nothing_of_the_rest():
    context = context_of(4)
    model = trees.take(models(context, 1), 0)
    mask = half_of_norm(model)
    run = jax.jit(functools.partial(prototypes.cluster_images, context))
    _, held, centre = run(context.clients, models(context, 3), mask, KEY)
    centre = np.asarray(centre)[np.asarray(held)]
    assert (centre[:, 2:] == 0).all() and (centre[:, :2] != 0).any()
    assert submodel.within(model, trees.take(mask, 0)).params["bn"]["scale"][3] == 0


def test_features_are_never_held_for_all_experts():
    """The shapes of a hundred classes: the program needs what one expert does."""
    num_classes = 100
    context = context_of(num_classes, [20] * 10, prototypes__clusters=60)
    model = jax.eval_shape(lambda: context.classifier.init(KEY, SHAPE))
    data = jax.eval_shape(lambda: context.clients)
    cluster = jax.ShapeDtypeStruct((10, 20), jnp.int32)
    program = jax.jit(
        functools.partial(prototypes.prototype_logits, context), static_argnums=0
    )
    lowered = program.lower("net", data, cluster, None, model, None)
    needed = lowered.compile().memory_analysis()
    logits = 4 * 10 * num_classes * 60 * num_classes
    assert needed.output_size_in_bytes == logits
    # All experts' features, four of an image in each, would take four times the logits.
    assert needed.temp_size_in_bytes < 1.5 * logits
