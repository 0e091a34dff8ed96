"""A classification network together with the normalisation of its input."""

import dataclasses
import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from mosaic_jax.core import errors, flops
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.nn import adapted, networks


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Pure functions of a `ModelState` and images [B, H, W, D] in [-1, 1].

    Attributes:
      module: network with the methods `features`, `head` and `__call__`.
      mean: of the data set per channel, where black is 0 and white is 1.
      std: standard deviation, likewise.
    """

    module: networks.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> ModelState:
        """Initial variables for images of `image_shape` (H, W, D)."""
        variables = self.module.init(key, jnp.zeros((1, *image_shape)), train=False)
        return ModelState(variables["params"], variables.get("batch_stats", {}))

    def head_paths(
        self, image_shape: tuple[int, int, int]
    ) -> frozenset[tuple[str, ...]]:
        """Paths ("params", ...) of the arrays that `head` reads.

        Args:
          image_shape: (H, W, D).
        """
        place = self.module.path if isinstance(self.module, adapted.Adapted) else ()
        features = jnp.zeros((1, self.num_features(image_shape)))

        def variables() -> Tree:
            if place:  # the head of a user's network is not asked for by itself
                return self.init(jax.random.key(0), image_shape).variables
            return self.module.init(jax.random.key(0), features, method="head")

        start = ("params", *place)
        found: Any = flax.traverse_util.flatten_dict(dict(jax.eval_shape(variables)))
        return frozenset(path for path in found if path[: len(start)] == start)

    def sows_moments(self, image_shape: tuple[int, int, int]) -> bool:
        """Whether all batch-norm layers tell `logits_and_moments`, and there are any.

        Args:
          image_shape: (H, W, D).
        """

        def of_image(image: Array) -> tuple[Tree, Tree]:
            model = self.init(jax.random.key(0), image_shape)
            _, sown = self.module.apply(
                model.variables, image, train=False, mutable=["moments"]
            )
            return model.batch_stats, sown.get("moments", {})

        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        batch_stats, moments = jax.eval_shape(of_image, image)
        same = jax.tree.structure(batch_stats) == jax.tree.structure(moments)
        return same and bool(jax.tree.leaves(moments))

    def outputs(
        self, image_shape: tuple[int, int, int]
    ) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
        """Shapes of what the network's methods return for two images; nothing is run.

        Args:
          image_shape: (H, W, D).

        Returns:
          Those of features, [2, F] each, and of logits, [2, K] each.
        """

        def of_images(image: Array) -> tuple[list[Array], list[Array]]:
            model = self.init(jax.random.key(0), image_shape)
            mask = jnp.ones(len(image), bool)
            together, trained, _ = self.train_outputs(model, image, mask)
            features = self.features(model, image)
            logits = [self.train_logits(model, image, mask)[0], together]
            logits += [self.logits(model, image), self.head(model, features)]
            return [trained, features], logits

        image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        return jax.eval_shape(of_images, image)

    def train_logits(
        self, model: ModelState, image: Array, mask: Array | None = None
    ) -> tuple[Array, Tree]:
        """Logits by batch statistics, and the updated running statistics.

        Args:
          model: variables of the network.
          image: [B, H, W, D] in [-1, 1].
          mask: [B] bool, images that count in batch statistics; None: all.

        Returns:
          Logits [B, K] and the new `batch_stats`, empty without batch-norm.
        """
        logits, updated = self.module.apply(
            model.variables,
            self.normalise(image),
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        return logits, updated.get("batch_stats", {})

    def train_outputs(
        self, model: ModelState, image: Array, mask: Array | None = None
    ) -> tuple[Array, Array, Tree]:
        """Like `train_logits`, with the features before the head.

        Args:
          model: variables of the network.
          image: [B, H, W, D] in [-1, 1].
          mask: [B] bool, images that count in batch statistics; None: all.

        Returns:
          Logits [B, K], features [B, F] and the new `batch_stats`.
        """

        def both(module: networks.Module, x: Array) -> tuple[Array, Array]:
            features = module.features(x, train=True, mask=mask)
            return module.head(features), features

        (logits, features), updated = self.module.apply(
            model.variables,
            self.normalise(image),
            method=both,
            mutable=["batch_stats"],
        )
        return logits, features, updated.get("batch_stats", {})

    def logits(self, model: ModelState, image: Array) -> Array:
        """Logits [B, K] of images [B, H, W, D] by running statistics."""
        variables = model.variables
        logits: Any = self.module.apply(variables, self.normalise(image), train=False)
        return logits

    def logits_and_moments(self, model: ModelState, image: Array) -> tuple[Array, Tree]:
        """Logits [B, K] by running statistics, and the batch's own moments.

        The moments are the mean and biased variance of the input of each batch-norm
        layer, a tree like `model.batch_stats`.
        """
        logits, sown = self.module.apply(
            model.variables, self.normalise(image), train=False, mutable=["moments"]
        )
        return logits, sown["moments"]

    def features(self, model: ModelState, image: Array) -> Array:
        """Penultimate features [B, F] of images [B, H, W, D] by running statistics."""
        features: Any = self.module.apply(
            model.variables, self.normalise(image), train=False, method="features"
        )
        return features

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """Number of features F for images of `image_shape` (H, W, D)."""
        model = jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return jax.eval_shape(self.features, model, image).shape[-1]

    def head(self, model: ModelState, features: Array) -> Array:
        """Logits [B, K] of features [B, F]."""
        logits: Any = self.module.apply(model.variables, features, method="head")
        return logits

    @functools.cache  # noqa: B019  a handful of classifiers live as long as the program
    def flops(self, image_shape: tuple[int, int, int]) -> float:
        """FLOPs of the logits of one image, as XLA counts them."""
        model = jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return flops.count(self.logits, model, image)

    def normalise(self, image: Array) -> Array:
        """Signed images [B, H, W, D], standardised by the data set's moments.

        Raises:
          DataError: they are not floats, so they cannot be signed images.
        """
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise errors.DataError(
                f"images of {image.dtype}: must be floats in [-1, 1], as"
                " `augment.to_signed` makes them of uint8"
            )
        return augment.normalise(image, self.mean, self.std)

    def denormalise(self, image: Array) -> Array:
        """Inverse of `normalise`."""
        return augment.denormalise(image, self.mean, self.std)
