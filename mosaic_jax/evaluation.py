"""Predictions on a whole set in fixed batches, and what is read off them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.data import augment
from mosaic_jax.types import Array


def predict(
    function: Callable[[Array], Array], image: Array, *, batch_size: int
) -> Array:
    """`function` of signed images [B, H, W, D], over uint8 `image` [N, ...] in batches.

    The last batch is padded with copies of the first image, which are cut away.
    """
    count = len(image)
    batch_size = min(batch_size, count)
    num_batches = -(-count // batch_size)
    rows = jnp.arange(num_batches * batch_size) % count
    batches = rows.reshape(num_batches, batch_size)
    result = jax.lax.map(lambda b: function(augment.to_signed(image[b])), batches)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], result)


def accuracy(logits: Array, label: Array) -> Array:
    """Share of right arg-max predictions, [] in 0..1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)


def confusion(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
    """[K, K] int: how often class (row) was taken for class (column)."""
    pairs = np.asarray(label) * num_classes + np.asarray(prediction)
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def per_class_accuracy(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
    """[K] float: accuracy within each class; NaN for a class without images."""
    matrix = confusion(prediction, label, num_classes)
    total = matrix.sum(axis=1)
    return np.where(total > 0, np.diag(matrix) / np.maximum(total, 1), np.nan)
