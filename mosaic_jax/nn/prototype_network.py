"""The network of FedTGP, which makes one prototype for each class."""

import flax.linen as nn
import jax

from mosaic_jax.core.types import Array
from mosaic_jax.nn.resnet import Linear


class PrototypeNetwork(nn.Module):
    """An embedding of the classes and two linear layers (Zhang et al., 2024)."""

    num_classes: int
    num_features: int

    @nn.compact
    def __call__(self) -> Array:
        """Prototypes of all classes, [K, F] float32."""
        shape = (self.num_classes, self.num_features)
        embedding = self.param("embedding", jax.random.normal, shape)
        hidden = nn.relu(Linear(self.num_features)(embedding))
        return Linear(self.num_features)(hidden)
