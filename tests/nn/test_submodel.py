"""Narrow networks within wide ones: which channels they hold, cut out and put back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng
from mosaic_jax.core.types import ModelState
from mosaic_jax.nn import mlp, resnet, submodel
from mosaic_jax.nn.classifier import Classifier
from tests import tiny

resnet.DEPTHS["two_blocks"] = ("basic", (1, 1))
resnet.DEPTHS["two_bottlenecks"] = ("bottleneck", (1, 1))

KEY = prng.root(0)
CLASSIFIER = Classifier(resnet.ResNet(4, "two_blocks", 4), (0.4,), (0.3,))


def initial(classifier=CLASSIFIER):
    return tiny.varied(classifier, KEY)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def close(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b
    )


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


@pytest.mark.parametrize(
    "module",
    [
        resnet.ResNet(4, "two_blocks", 4),
        resnet.ResNet(4, "two_bottlenecks", 4),
        mlp.MLP(4, 8),
    ],
    ids=["two_blocks", "two_bottlenecks", "mlp"],
)
@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.slow
def test_a_narrow_network_among_zeros_is_the_same_function(module, rate):
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
