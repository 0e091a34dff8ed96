"""Masked batch-norm, the GAN's sizes, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.nn import conditional, dcgan, meta, norm, resnet


def test_masked_batch_norm_equals_the_smaller_batch():
    module = norm.BatchNorm()
    x = jax.random.normal(jax.random.key(0), (6, 3, 3, 2))
    mask = jnp.arange(6) < 4
    variables = module.init(jax.random.key(1), x, train=False)
    mutable = ["batch_stats", "moments"]
    small, expected = module.apply(variables, x[:4], train=True, mutable=mutable)
    full, found = module.apply(variables, x, train=True, mask=mask, mutable=mutable)
    np.testing.assert_allclose(full[:4], small, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )


def test_batch_norm_with_nothing_in_the_mask_is_finite():
    module = norm.BatchNorm()
    x = jnp.ones((2, 3))
    variables = module.init(jax.random.key(0), x, train=False)
    out, _ = module.apply(
        variables, x, train=True, mask=jnp.zeros(2, bool), mutable=["batch_stats"]
    )
    assert np.isfinite(out).all()


@pytest.mark.parametrize("image_size", dcgan.IMAGE_SIZES)
def test_dcgan_sizes(image_size):
    generator = dcgan.Generator(image_size, channels=2, width=2)
    discriminator = dcgan.Discriminator(image_size, width=2)
    z = jnp.zeros((3, 5))

    def run():
        image, _ = generator.init_with_output(jax.random.key(0), z, train=False)
        scores, _ = discriminator.init_with_output(
            jax.random.key(1), image, train=False
        )
        return image, scores

    image, scores = jax.eval_shape(run)
    assert image.shape == (3, image_size, image_size, 2)
    assert scores.shape == (3,)


def test_untrained_heads_by_hand():
    probability = jnp.array([[[0.7, 0.3], [0.6, 0.4]]])
    expert_logits = jnp.log(probability)
    diagonal = meta.HEADS["diagonal"](2).apply({}, expert_logits, train=False)
    np.testing.assert_allclose(diagonal, np.log([[0.7, 0.4]]), rtol=1e-5)
    mean = meta.HEADS["mean"](2).apply({}, expert_logits, train=False)
    np.testing.assert_allclose(mean, expert_logits.mean(axis=1), rtol=1e-5)


def test_group_norm_by_hand():
    module = norm.GroupNorm(groups=2)
    x = jnp.array([1.0, 3.0, 10.0, 10.0, 5.0, 7.0, 10.0, 14.0]).reshape(1, 2, 1, 4)
    variables = module.init(jax.random.key(0), x, train=True)
    out = module.apply(variables, x, train=True)
    # First group 1, 3, 5, 7: mean 4, variance 5; second 10, 10, 10, 14: 11, 3.
    expected = jnp.array([-3, -1, 1, 3]) / jnp.sqrt(5), jnp.array([-1, -1, -1, 3])
    first, second = out[..., :2].reshape(-1), out[..., 2:].reshape(-1)
    np.testing.assert_allclose(first, expected[0], rtol=1e-5)
    np.testing.assert_allclose(second, expected[1] / jnp.sqrt(3), rtol=1e-5)
    assert "batch_stats" not in variables


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    module = resnet.ResNet(3, width=2, dtype="bfloat16")
    x = jnp.ones((2, 8, 8, 1))
    logits, variables = jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), x, train=False)
    )
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("generator", "latent_dim", "num_parameters"),
    [
        (conditional.DenseGenerator(), 256, 2_328_899),
        # Two biases that batch-norm takes out again, 128 + 64, are left out.
        (conditional.FedFTGGenerator(), 100, 682_499 - 192),
        (conditional.DFRDGenerator(), 100, 3_448_552),
    ],
    ids=["dense", "fedftg", "dfrd"],
)
def test_server_generators_have_the_published_size(
    generator, latent_dim, num_parameters
):
    labels = (
        [] if isinstance(generator, conditional.DenseGenerator) else [jnp.arange(2)]
    )
    z = jnp.zeros((2, latent_dim))
    variables = jax.eval_shape(
        lambda: generator.init(jax.random.key(0), z, *labels, train=False)
    )
    found = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert found == num_parameters


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    "cls", [conditional.FedFTGGenerator, conditional.DFRDGenerator]
)
def test_server_generators_fit_other_images(cls, size):
    generator = cls(size, 1, num_classes=3, width=4)
    z, label = jnp.zeros((2, 100)), jnp.arange(2)
    found = jax.eval_shape(
        lambda: generator.init_with_output(jax.random.key(0), z, label, train=False)[0]
    )
    assert jax.tree.leaves(found)[0].shape == (2, size, size, 1)
