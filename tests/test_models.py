"""Masked batch-norm, the GAN's sizes, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.models import dcgan, meta, norm


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
    diagonal = meta.build("diagonal", 2).apply({}, expert_logits, train=False)
    np.testing.assert_allclose(diagonal, np.log([[0.7, 0.4]]), rtol=1e-5)
    mean = meta.build("mean", 2).apply({}, expert_logits, train=False)
    np.testing.assert_allclose(mean, expert_logits.mean(axis=1), rtol=1e-5)
