"""The generator of FedGen, of features instead of images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.nn.norm import BatchNorm
from mosaic_jax.nn.resnet import Linear


class FeatureGenerator(nn.Module):
    """Two linear layers from noise and label to features (Zhu et al., 2021)."""

    features: int
    num_classes: int
    hidden: int = 256

    @nn.compact
    def __call__(self, z: Array, label: Array, *, train: bool) -> Array:
        """Features of a class.

        Args:
          z: noise [B, nz].
          label: [B] int32, the class that the features should be taken for.
          train: whether batch-norm uses, and updates by, the moments of the batch.

        Returns:
          [B, features] float32.
        """
        one_hot = jax.nn.one_hot(label, self.num_classes)
        x = Linear(self.hidden)(jnp.concatenate([z, one_hot], axis=-1))
        return Linear(self.features)(nn.relu(BatchNorm()(x, train=train)))
