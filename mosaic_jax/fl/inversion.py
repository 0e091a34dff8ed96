"""Gradient inversion: images found by the gradient that a client sends.

Geiping et al., Inverting gradients, NeurIPS 2020: images whose gradient has the
direction of the one that was sent, and that are smooth. Labels are taken as known: of
few images the gradient of the last layer tells them (Zhao et al., iDLG, 2020).
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, Batch, ModelState, Tree
from mosaic_jax.fl import training
from mosaic_jax.nn.classifier import Classifier


def objective(
    classifier: Classifier,
    model: ModelState,
    image: Array,
    label: Array,
    sent: Tree,
    smooth: float,
) -> Array:
    """What is least for images with the gradient that was sent, [] float32.

    Args:
      classifier: the network.
      model: that the gradient was taken at.
      image: [B, H, W, D] in [-1, 1].
      label: [B] int32.
      sent: the gradient, like the parameters.
      smooth: weight of the total variation.
    """
    batch = Batch(image, label, jnp.ones(len(label), bool))
    found, _ = training.gradient(classifier, model, batch)
    return cosine_distance(found, sent) + smooth * total_variation(image)


def cosine_distance(a: Tree, b: Tree) -> Array:
    """One less the cosine of the angle between two trees, [] in [0, 2]."""

    def product(a: Tree, b: Tree) -> Array:
        return trees.total(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))

    norms = product(a, a) * product(b, b)
    return 1 - product(a, b) * jax.lax.rsqrt(jnp.maximum(norms, 1e-30))


def total_variation(image: Array) -> Array:
    """Mean absolute difference of neighbours in images [B, H, W, D], []."""
    down = jnp.abs(image[:, 1:] - image[:, :-1]).mean()
    across = jnp.abs(image[:, :, 1:] - image[:, :, :-1]).mean()
    return down + across


def psnr(found: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
    """How alike images are, in the order of the second set in which they are most.

    Args:
      found: [B, H, W, D] in [-1, 1].
      image: likewise.

    Returns:
      Peak signal-to-noise ratio in dB, mean over images, of which one that is equal
      counts 100; and the order [B] of `found`.
    """
    flat = [np.asarray(x, float).reshape(len(x), -1) for x in (image, found)]
    square = ((flat[0][:, None] - flat[1][None]) ** 2).mean(axis=2)
    ratio = np.minimum(10 * np.log10(4 / np.maximum(square, 1e-12)), 100)
    rows, order = scipy.optimize.linear_sum_assignment(-ratio)
    return float(ratio[rows, order].mean()), order
