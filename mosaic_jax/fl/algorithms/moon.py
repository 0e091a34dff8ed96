"""MOON (Li et al., 2021): features near the global model's, far from the last own."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.nn import losses


@dataclasses.dataclass(frozen=True)
class Moon(Algorithm):
    """Model-contrastive federated learning (Li et al., CVPR 2021; equation 3).

    Added to the cross-entropy is mu times the mean over images of
    `-log(exp(s(z, z_glob) / T) / (exp(s(z, z_glob) / T) + exp(s(z, z_prev) / T)))`,
    with cosines s of the features z of the local model, z_glob of the one received, and
    z_prev of the client's own from its last round; before its first one, of the initial
    model. Features are those before the head: there is no projection head.
    """

    # Features by the model received and by the last own one.
    further_passes = 2

    mu: float = schema.at_least(0, default=1.0, meaning="weight of the contrast")
    temperature: float = schema.above(0, default=0.5, meaning="T of the cosines")

    def init_client(self, model: ModelState) -> Tree:
        """The initial model."""
        return model

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """Mu times the mean contrast of the minibatch's features."""
        del params
        turn, image = seen.turn, seen.batch.image
        near, far = (
            cosine(seen.features, seen.classifier.features(model, image))
            for model in (turn.model, turn.state)
        )
        contrast = jax.nn.softplus((far - near) / self.temperature)
        return self.mu * losses.masked_mean(contrast, seen.batch.mask)

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The local model, which the client keeps as well."""
        del turn, loss
        return trained, trained


def cosine(a: Array, b: Array) -> Array:
    """Cosines [B] of rows of [B, F]; 0 for a row of zeros, as in PyTorch."""
    least = 1e-16  # of squared norms, whose roots PyTorch keeps above 1e-8

    def unit(x: Array) -> Array:
        square = jnp.sum(x**2, axis=-1, keepdims=True)
        return x / jnp.sqrt(jnp.maximum(square, least))

    return jnp.sum(unit(a) * unit(b), axis=-1)
