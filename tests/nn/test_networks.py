"""What every network must hold to, at tiny widths, and what is known of some."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.types import ModelState
from mosaic_jax.nn import mobilenet, networks, norm, resnet, state_dicts, submodel
from mosaic_jax.nn.classifier import Classifier
from tests import tiny

KEY = prng.root(0)
SHAPE = (16, 16, 1)
# Parts of the larger ones: what is repeated is the same again.
SMALL = {
    "resnet18": {"width": 2},
    "mobilenetv2": {"width": 2, "stages": ((1, 16, 1, 1), (2, 24, 2, 2))},
    "vit": {"width": 2, "depth": 1},
    "cnn": {"width": 2},
    "fedavg_cnn": {"width": 2},
    "lenet5": {"width": 16},
    "mlp": {"width": 4},
}
# Its programs compile soon.
FAST = "lenet5"
every_network = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "resnet18" else name
        for name in SMALL
    ],
)


def build(name, num_classes=4, **fields):
    return networks.NETWORKS[name](num_classes=num_classes, **SMALL[name] | fields)


def classifier(name, depth=1, **fields):
    return Classifier(build(name, **fields), (0.4,) * depth, (0.3,) * depth)


@functools.cache
def varied(name):
    return tiny.varied(classifier(name), KEY)


def count(name, num_classes, shape, **fields):
    module = networks.NETWORKS[name](num_classes=num_classes, **fields)
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_there_is_one_of_each_kind():
    others = set(networks.NETWORKS) - set(SMALL)
    # Other tests add depths of their own.
    assert others == {name for name in resnet.DEPTHS if name[-1].isdigit()} - {
        "resnet18"
    }


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "fields", "expected"),
    [
        ("lenet5", 10, (32, 32, 1), {}, 61_706),
        ("fedavg_cnn", 10, (28, 28, 1), {}, 1_663_370),
        # Its first dense layer sees 8 x 8 pixels in place of 7 x 7, of three colours.
        ("fedavg_cnn", 10, (32, 32, 3), {}, 1_663_370 + 15 * 64 * 512 + 50 * 32),
        ("mobilenetv2", 1000, (32, 32, 3), {}, 3_504_872),
        ("mobilenetv2", 1000, (32, 32, 3), {"width": 32}, 1_968_680),
        # DeiT-Ti: twice as deep, patches of 16 pixels.
        ("vit", 1000, (224, 224, 3), {"depth": 12, "patch": 16}, 5_717_416),
    ],
)
def test_published_numbers_of_parameters(name, num_classes, shape, fields, expected):
    assert count(name, num_classes, shape, **fields) == expected


@every_network
def test_images_of_every_size_and_depth(name):
    for size, depth, dtype in (
        (16, 1, "float32"),
        (32, 3, "bfloat16"),
        (64, 1, "float32"),
    ):
        network = classifier(name, depth, dtype=dtype)
        features, logits = network.outputs((size, size, depth))
        assert {one.shape for one in logits} == {(2, 4)}
        assert len({one.shape for one in features}) == 1
        assert all(one.dtype == jnp.float32 for one in (*features, *logits))
    assert network.head_paths((64, 64, 1)) == {
        ("params", "fc", "kernel"),
        ("params", "fc", "bias"),
    }


@pytest.mark.parametrize(
    "name",
    [
        name if name == FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in SMALL
    ],
)
def test_clients_together_are_clients_one_by_one(name):
    network, count = classifier(name), 2
    models = jax.tree.map(
        lambda leaf: jnp.stack([leaf, 1.1 * leaf + 0.01]), varied(name)
    )
    image = jax.random.uniform(prng.named(KEY, "x"), (count, 3, *SHAPE), minval=-1)
    mask = jnp.array([[True, True, False], [True, True, True]])

    def step(model, image, mask):
        def loss(params):
            changed = model.replace(params=params)
            logits, statistics = network.train_logits(changed, image, mask)
            return jnp.sum(jnp.where(mask[:, None], logits, 0) ** 2), statistics

        return jax.grad(loss, has_aux=True)(model.params)

    @jax.jit
    def both(models, image, mask):
        alone = step(*trees.take((models, image.at[0, 2].set(0.5), mask), 0))
        return jax.vmap(step)(models, image, mask), alone

    together, alone = both(models, image, mask)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    # What the mask leaves out, which is another image here, changes nothing.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
        trees.take(together, 0),
        alone,
    )


@every_network
def test_a_narrow_network_is_cut_out_of_a_wide_one(name):
    module = build(name, **({"width": 8} if name != "lenet5" else {}))
    if not hasattr(module, "widths"):
        assert name == "vit"
        return
    wide, narrow = (
        jax.eval_shape(
            lambda one=one: Classifier(one, (0.4,), (0.3,)).init(
                jax.random.key(0), SHAPE
            )
        )
        for one in (module, module.clone(rate=0.5))
    )
    channels = {
        space: jnp.arange(submodel.kept(width, 0.5))
        for space, width in module.widths.items()
    }
    found = jax.eval_shape(lambda m: submodel.cut(m, module.spaces, channels), wide)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, narrow)
    assert jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, wide)


@every_network
def test_norms_without_statistics(name):
    if name not in ("resnet18", "mobilenetv2", "cnn"):
        assert not jax.tree.leaves(varied(name).batch_stats)
        return
    for kind in norm.NORMS:
        shapes = jax.eval_shape(
            lambda kind=kind: classifier(name, norm=kind).init(jax.random.key(0), SHAPE)
        )
        assert bool(jax.tree.leaves(shapes.batch_stats)) == (kind == "batch")


def refused(name, **fields):
    with pytest.raises(errors.ConfigError) as caught:
        networks.build_classifier(name, 4, SHAPE, **fields)
    return str(caught.value)


def test_norms_that_a_network_cannot_have_are_refused():
    networks.build_classifier("vit", 4, SHAPE, norm="layer", width=2)
    networks.build_classifier("vit", 4, SHAPE, norm="batch", width=2)
    networks.build_classifier("cnn", 4, SHAPE, norm="layer", width=2)
    assert refused("vit", norm="group") == (
        "model.norm = 'group': must be 'layer' for the network 'vit', which has no"
        " field 'norm'"
    )
    assert refused("lenet5", norm="layer") == (
        "model.norm = 'layer': must be 'batch' for the network 'lenet5', which has no"
        " field 'norm'"
    )
    assert refused("vit", rate=0.5) == (
        "model.rate = 0.5: must be 1.0 for the network 'vit', which has no field 'rate'"
    )


def test_layer_norm_by_hand():
    x = jnp.array([1.0, 3.0, 5.0, 7.0, 0.0, 0.0, 0.0, 2.0]).reshape(2, 2, 1, 2)
    out, _ = norm.LayerNorm().init_with_output(jax.random.key(0), x, train=True)
    # Mean 4, variance 5; mean 0.5, variance 0.75.
    expected = [-3, -1, 1, 3] / np.sqrt(5), np.array([-1, -1, -1, 3]) / np.sqrt(3)
    np.testing.assert_allclose(out.reshape(2, 4), expected, rtol=1e-4)


@pytest.mark.parametrize(("size", "groups"), [(6, 6), (12, 6), (10, 5), (24, 8)])
def test_groups_divide_the_channels(size, groups):
    x = jnp.arange(2.0 * 2 * 2 * size).reshape(2, 2, 2, size) ** 1.5
    found, _ = norm.GroupNorm().init_with_output(jax.random.key(0), x, train=True)
    expected, _ = norm.GroupNorm(groups=groups).init_with_output(
        jax.random.key(0), x, train=True
    )
    np.testing.assert_array_equal(found, expected)


def test_flops_of_lenet_by_hand():
    network = Classifier(networks.NETWORKS["lenet5"](num_classes=10), (0.4,), (0.3,))
    maps = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150
    assert network.flops((32, 32, 1)) == 2 * (maps + 400 * 120 + 120 * 84 + 84 * 10)


def test_flops_of_depthwise_layers_count():
    module = mobilenet.MobileNetV2(4, 64, stages=((1, 32, 1, 1),))
    network = Classifier(module, (0.4,), (0.3,))
    stem, block = 9 * 1 * 32, 9 * 32 + 32 * 32
    each = stem + block + 32 * 1280
    assert network.flops(SHAPE) == 2 * (16 * 16 * each + 1280 * 4)


@pytest.mark.parametrize(
    ("channels", "expected"), [(32, 32), (16.8, 16), (11.2, 16), (1, 8), (44.8, 48)]
)
def test_multiples_of_eight(channels, expected):
    assert mobilenet.rounded(channels) == expected


@every_network
def test_state_dicts_name_every_array_once(name):
    model: ModelState = varied(name)
    flat = flax.traverse_util.flatten_dict(model.variables)
    for table in state_dicts.layouts(name, flat):
        assert {entry.path for entry in table} == flat.keys()
        assert len({entry.name for entry in table}) == len(flat)
        for entry in table:
            array = np.asarray(flat[entry.path])
            there = entry.to_torch(array)
            np.testing.assert_array_equal(entry.to_jax(there, array.shape), array)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("lenet5", (28, 40, 1), "must be squares, as its dense layers take the whole"),
        ("fedavg_cnn", (40, 28, 1), "must be squares, as its dense layers take the wh"),
        ("vit", (30, 32, 1), "sides must be multiples of 4, the patch"),
    ],
)
def test_images_that_a_network_does_not_take(name, shape, told):
    network = networks.build_classifier(name, 10, shape, width=8)
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(
            lambda: network.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
        )
