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


def test_clients_of_part_of_the_network_send_nothing_of_the_rest():
    context = context_of(4)
    model = trees.take(models(context, 1), 0)
    ones = jax.tree.map(lambda leaf: jnp.ones([1] * leaf.ndim), model)
    half = jnp.array([1.0, 1.0, 0.0, 0.0])
    share = ones.replace(
        params=ones.params | {"bn": jax.tree.map(lambda _: half, ones.params["bn"])}
    )
    share = trees.broadcast(share, 3)
    run = jax.jit(functools.partial(experts.cluster_images, context))
    _, held, centre = run(context.clients, models(context, 3), share, KEY)
    centre = np.asarray(centre)[np.asarray(held)]
    assert (centre[:, 2:] == 0).all() and (centre[:, :2] != 0).any()
    assert submodel.within(model, trees.take(share, 0)).params["bn"]["scale"][3] == 0


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
