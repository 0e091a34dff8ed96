"""A multilayer perceptron: the first network of the federated literature."""

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.nn import submodel
from mosaic_jax.nn.resnet import Linear


class MLP(nn.Module):
    """Two hidden layers with ReLU, as in the 2NN of McMahan et al. (2017).

    Attributes:
      num_classes: K, size of the output.
      width: units of each hidden layer.
      dtype: of activations; parameters and logits are float32.
      rate: fraction of the units of the hidden layers that this network has.
      scale: factor of the hidden layers' outputs in training.
    """

    num_classes: int
    width: int = 64
    dtype: str = "float32"
    rate: float = 1.0
    scale: float = 1.0

    def setup(self) -> None:
        """Hidden layers, classifier."""
        kept = [submodel.kept(width, self.rate) for width in self.widths.values()]
        self.hidden = [Linear(width) for width in kept]
        self.fc = Linear(self.num_classes)

    @property
    def widths(self) -> dict[str, int]:
        """Units of each channel space at rate 1; see `submodel`."""
        return {f"hidden{i}": self.width for i in range(2)}

    @property
    def spaces(self) -> submodel.Spaces:
        """Channel spaces of the input and the output of each layer."""
        return {
            "hidden_0": (None, "hidden0"),
            "hidden_1": ("hidden0", "hidden1"),
            "fc": ("hidden1", submodel.CLASSES),
        }

    def features(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Output of the last hidden layer.

        Args:
          x: normalised images [B, H, W, D] float32.
          train: whether outputs are multiplied by `scale`.
          mask: makes no difference.

        Returns:
          [B, width] float32.
        """
        del mask
        x = x.reshape(len(x), -1).astype(self.dtype)
        for layer in self.hidden:
            x = nn.relu(layer(x) * (self.scale if train else 1.0)).astype(self.dtype)
        return x.astype(jnp.float32)

    def head(self, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.fc(features)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Logits [B, K]; arguments as of `features`."""
        return self.head(self.features(x, train=train, mask=mask))
