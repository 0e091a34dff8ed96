"""Predictions on a whole data set in batches, and accuracies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import sharing
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.data import augment


def predict(
    function: Callable[[Array], Tree], image: Array, *, batch_size: int
) -> Tree:
    """Apply a function to images in batches of equal size.

    The last batch is padded with images from the start; their results are cut off. On
    the server the devices share each batch.

    Args:
      function: of signed images [B, H, W, D], of each by itself.
      image: uint8 [N, H, W, D].
      batch_size: B, rounded up to a multiple of the devices that share it.

    Returns:
      The function's results for all images, leaves [N, ...].
    """
    count = len(image)
    batch_size = sharing.multiple(min(batch_size, count))
    num_batches = -(-count // batch_size)
    rows = jnp.arange(num_batches * batch_size) % count
    batches = rows.reshape(num_batches, batch_size)

    def one(rows: Array) -> Tree:
        return function(augment.to_signed(sharing.spread(image[rows])))

    result = sharing.gather(jax.lax.map(one, batches))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], result)


def accuracy(logits: Array, label: Array) -> Array:
    """Accuracy of the arg-max of logits [N, K] for labels [N], [] in 0..1."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == label)


def confusion(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
    """Confusion matrix: how often each class (row) was predicted as each (column).

    Args:
      prediction: [N] int, predicted classes.
      label: [N] int, true classes.
      num_classes: K.

    Returns:
      [K, K] int.
    """
    pairs = np.asarray(label) * num_classes + np.asarray(prediction)
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def per_class_accuracy(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
    """Accuracy within each class.

    Args:
      prediction: [N] int, predicted classes.
      label: [N] int, true classes.
      num_classes: K.

    Returns:
      [K] float in 0..1; NaN for a class without images.
    """
    matrix = confusion(prediction, label, num_classes)
    total = matrix.sum(axis=1)
    return np.where(total > 0, np.diag(matrix) / np.maximum(total, 1), np.nan)
