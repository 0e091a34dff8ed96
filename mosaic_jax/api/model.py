"""A trained model that is used on its own."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.special

from mosaic_jax.core import errors, files, tensor_files, trees
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.data import augment, dataset
from mosaic_jax.data.dataset import Info
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained classifier, for images as the user has them.

    Images are uint8, or floats in [0, 1], [N, H, W] or [N, H, W, D]; they are resized
    to the size that the network was trained on, and normalised as then.

    Attributes:
      classifier: the network, with the normalisation of its input.
      info: properties of the images that it was trained on.
      state: its variables.
    """

    classifier: Classifier
    info: Info
    state: ModelState

    @property
    def variables(self) -> dict[str, Tree]:
        """What `module.apply` of the network takes, of images that are normalised."""
        return self.state.variables

    def logits(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """Logits [N, K] of images, by running statistics.

        Args:
          images: see above.
          batch_size: images in a step.

        Raises:
          DataError: images are of another type, range or shape.
        """
        image = self._fitted(images)
        found = []
        for first in range(0, len(image), batch_size):
            part = image[first : first + batch_size]
            # Batches of one length, so that one program is compiled.
            full = np.resize(part, (batch_size, *part.shape[1:]))
            found.append(np.asarray(self._program(self.state, full))[: len(part)])
        return np.concatenate(found)

    def probabilities(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """Softmax [N, K] of the logits; arguments as of `logits`."""
        return scipy.special.softmax(self.logits(images, batch_size), axis=-1)

    def predict(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """Most likely classes [N] int; arguments as of `logits`."""
        return self.logits(images, batch_size).argmax(axis=-1)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the variables as safetensors, from which a study may start.

        Args:
          path: of the file; names in it are "params/..." and "batch_stats/...".

        Raises:
          ConfigError: the package safetensors is not installed, or the file cannot be
            written there.
        """
        path = pathlib.Path(path)
        files.check_output("path", path, [".safetensors"])
        arrays = trees.flatten(self.variables)
        tensor_files.write(path, {k: np.asarray(v) for k, v in arrays.items()})

    def _fitted(self, images: Any) -> np.ndarray:
        """Images uint8 [N, H, W, D] as the network takes them."""
        image = dataset.from_user(images, "images", self.info.size)
        depth = self.info.channels
        if image.shape[-1] not in (1, depth):
            raise errors.DataError(
                f"images: {image.shape[-1]} channels: must be {depth}, as in training"
            )
        return np.broadcast_to(image, (*image.shape[:3], depth))

    @functools.cached_property
    def _program(self) -> Callable[[ModelState, np.ndarray], Array]:
        def run(state: ModelState, image: Array) -> Array:
            return self.classifier.logits(state, augment.to_signed(image))

        return jax.jit(run)
