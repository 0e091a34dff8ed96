"""Prototypes: each expert's logits on them, one expert's features at a time."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import parallel, prng, trees
from mosaic_jax.models import submodel
from mosaic_jax.stages import experts
from mosaic_jax.types import ClientModels
from tests import tiny

KEY = prng.root(0)
SIZES = [5, 30, 12]
SHAPE = (16, 16, 1)


def context_of(num_classes, sizes=SIZES, **changes):
    axis = parallel.build(np.array(sizes), at_once=1, num_devices=1)
    data = tiny.dataset(sizes, num_classes)
    info = types.SimpleNamespace(num_classes=num_classes, image_shape=SHAPE)
    return types.SimpleNamespace(
        settings=tiny.study(**changes),
        axis=axis,
        clients=data,
        data=types.SimpleNamespace(info=info),
        networks={"net": tiny.classifier(num_classes)},
        name="net",
        classifier=tiny.classifier(num_classes),
        rates=(),
        key=KEY,
    )


def models(context, count):
    init = jax.jit(jax.vmap(lambda i: context.classifier.init(prng.at(KEY, i), SHAPE)))
    return init(jnp.arange(count))


@pytest.mark.parametrize("space", ["expert", "client", "global"])
def test_an_expert_reads_the_mean_of_the_members_in_its_own_features(space):
    context = context_of(4, prototypes__space=space)
    own, found, model = models(context, 3), models(context, 4), models(context, 1)
    model = trees.take(model, 0)
    trained = ClientModels(own, jnp.zeros(3, jnp.int32))
    result, _, _ = experts._of_network(context, trained, model, {"net": found})
    features = jax.jit(context.classifier.features)
    head = jax.jit(context.classifier.head)
    data = context.clients
    cluster, held, _ = jax.jit(functools.partial(experts.cluster_images, context))(
        data, own if space != "global" else trees.broadcast(model, 3), None, KEY
    )
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


@pytest.mark.parametrize(
    ("space", "features", "down"),
    [
        ("expert", 5 * 4, {"experts": 3 * 5 * MODEL}),
        ("client", 4, {}),
        ("global", 4, {}),
    ],
)
def test_bytes_of_prototypes_by_hand(space, features, down):
    """Features of a prototype in float32, in each expert's or in one model's, and its
    label; in the experts' features clients receive all experts."""
    context = context_of(5, prototypes__space=space)
    context.of = lambda name: context
    found = types.SimpleNamespace(model=models(context, 5))
    trained = ClientModels(models(context, 3), jnp.zeros(3, jnp.int32))
    run = experts._run_prototypes(
        context,
        trees.take(models(context, 1), 0),
        client_models=trained,
        experts=found,
    )
    with pytest.raises(StopIteration) as end:
        next(run)
    outcome = end.value.value
    count = len(outcome.artifacts["prototypes"].label)
    assert outcome.results == {"num_prototypes": count}
    assert outcome.up == {"prototypes": count * (4 * features + 4)}
    assert outcome.down == down


def half_of_norm(model):
    """`share` of three clients that hold two of four channels of the batch-norm."""
    ones = jax.tree.map(lambda leaf: jnp.ones([1] * leaf.ndim), model)
    half = jnp.array([1.0, 1.0, 0.0, 0.0])
    share = ones.replace(
        params=ones.params | {"bn": jax.tree.map(lambda _: half, ones.params["bn"])}
    )
    return trees.broadcast(share, 3)


def test_clients_of_part_of_the_network_send_nothing_of_the_rest():
    context = context_of(4)
    model = trees.take(models(context, 1), 0)
    share = half_of_norm(model)
    run = jax.jit(functools.partial(experts.cluster_images, context))
    _, held, centre = run(context.clients, models(context, 3), share, KEY)
    centre = np.asarray(centre)[np.asarray(held)]
    assert (centre[:, 2:] == 0).all() and (centre[:, :2] != 0).any()
    assert submodel.within(model, trees.take(share, 0)).params["bn"]["scale"][3] == 0


def test_clients_of_part_of_the_network_receive_that_part_of_experts(monkeypatch):
    context = context_of(5, prototypes__space="expert")
    model = trees.take(models(context, 1), 0)
    share = half_of_norm(model)
    context.rates = (0.5,) * 3
    monkeypatch.setattr(experts.rounds, "held_in", lambda *_: share)
    trained = ClientModels(models(context, 3), jnp.zeros(3, jnp.int32))
    found = {"net": models(context, 5)}
    _, received, _ = experts._of_network(context, trained, model, found)
    # Two numbers each of scale and shift are left out.
    assert received == 3 * 5 * (MODEL - 4 * 2 * 2)


def test_experts_of_two_networks_stand_side_by_side():
    context = context_of(5, prototypes__space="expert")
    context.networks = {"net": context.classifier, "other": tiny.classifier(5)}
    model, own = trees.take(models(context, 1), 0), models(context, 3)
    trained = ClientModels(own, jnp.zeros(3, jnp.int32))
    found = {"net": models(context, 5)}
    found["other"] = jax.tree.map(lambda leaf: 1.5 * leaf, found["net"])
    both, received, sent = experts._of_network(context, trained, model, found)
    alone = [
        experts._of_network(context, trained, model, {name: found[name]})[0].logits
        for name in ("net", "other")
    ]
    assert not np.allclose(*alone)
    np.testing.assert_array_equal(both.logits, np.concatenate(alone, axis=1))
    assert received == 3 * 2 * 5 * MODEL
    assert sent == len(both.label) * (4 * (2 * 5 * 4) + 4)


def test_features_are_never_held_for_all_experts():
    """The shapes of a hundred classes: the program needs what one expert does."""
    num_classes = 100
    context = context_of(num_classes, [20] * 10, prototypes__clusters=60)
    model = jax.eval_shape(lambda: context.classifier.init(KEY, SHAPE))
    data = jax.eval_shape(lambda: context.clients)
    cluster = jax.ShapeDtypeStruct((10, 20), jnp.int32)
    program = jax.jit(
        functools.partial(experts.prototype_logits, context), static_argnums=0
    )
    lowered = program.lower("net", data, cluster, None, model, None)
    needed = lowered.compile().memory_analysis()
    logits = 4 * 10 * num_classes * 60 * num_classes
    assert needed.output_size_in_bytes == logits
    # All experts' features, four of an image in each, would take four times the logits.
    assert needed.temp_size_in_bytes < 1.5 * logits
