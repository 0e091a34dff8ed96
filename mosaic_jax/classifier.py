"""A classifier with its input normalisation: what the rest of the library calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mosaic_jax import flops, models
from mosaic_jax.data import augment
from mosaic_jax.types import Array, ModelState, Tree


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Pure functions of a `ModelState` and images [B, H, W, D] in [-1, 1].

    Attributes:
      module: network with `features`, `head` and `__call__`.
      mean: of the data set per channel, black 0, white 1.
      std: likewise.
    """

    module: models.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: Array, image_shape: tuple[int, int, int]) -> ModelState:
        """Fresh variables for images of `image_shape` (H, W, D)."""
        variables = self.module.init(key, jnp.zeros((1, *image_shape)), train=False)
        return ModelState(variables["params"], variables.get("batch_stats", {}))

    def train_logits(
        self, model: ModelState, image: Array, mask: Array | None = None
    ) -> tuple[Array, Tree]:
        """Logits [B, K] by batch statistics, and the updated running ones."""
        logits, updated = self.module.apply(
            model.variables,
            self.normalise(image),
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        return logits, updated.get("batch_stats", {})

    def logits(self, model: ModelState, image: Array) -> Array:
        """Logits [B, K] by running statistics."""
        return self.module.apply(model.variables, self.normalise(image), train=False)

    def logits_and_moments(self, model: ModelState, image: Array) -> tuple[Array, Tree]:
        """`logits`, and each batch-norm layer's batch mean and variance."""
        logits, sown = self.module.apply(
            model.variables, self.normalise(image), train=False, mutable=["moments"]
        )
        return logits, sown["moments"]

    def features(self, model: ModelState, image: Array) -> Array:
        """Penultimate features [B, F] by running statistics."""
        return self.module.apply(
            model.variables, self.normalise(image), train=False, method="features"
        )

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """F, of images of `image_shape` (H, W, D)."""
        model = jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return jax.eval_shape(self.features, model, image).shape[-1]

    def head(self, model: ModelState, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        return self.module.apply(model.variables, features, method="head")

    @functools.cache  # noqa: B019  a handful of classifiers live as long as the program
    def flops(self, image_shape: tuple[int, int, int]) -> float:
        """Floating-point operations of one image's logits, as XLA counts them."""
        model = jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return flops.count(self.logits, model, image)

    def normalise(self, image: Array) -> Array:
        """Signed images to zero mean and unit deviation of the data set."""
        return augment.normalise(image, self.mean, self.std)

    def denormalise(self, image: Array) -> Array:
        """Inverse of `normalise`."""
        return augment.denormalise(image, self.mean, self.std)
