"""FedProto (Tan et al., 2022): features are pulled towards mean class prototypes."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.prototypical import Prototypical
from mosaic_jax.fl.class_means import ClassMeans, GlobalPrototypes


@dataclasses.dataclass(frozen=True)
class FedProto(Prototypical):
    """The global prototype of a class is the mean of its class means.

    A client weighs as many images of the class as it holds (equation 6 of the paper). A
    class that nobody sends in a round keeps its prototype.
    """

    def init_prototypes(
        self, key: jax.Array, num_classes: int, num_features: int
    ) -> GlobalPrototypes:
        """None is known.

        Args:
          key: of what is random, which nothing is.
          num_classes: K.
          num_features: F.
        """
        del key
        return GlobalPrototypes(
            jnp.zeros((num_classes, num_features)), jnp.zeros(num_classes, bool)
        )

    def prototypes(self, state: GlobalPrototypes) -> GlobalPrototypes:
        """The state itself."""
        return state

    def learn(
        self, state: GlobalPrototypes, sent: ClassMeans, key: jax.Array
    ) -> tuple[GlobalPrototypes, dict[str, Array]]:
        """`sum_i n_ik mean_ik / sum_i n_ik` over the clients that sent class k.

        Args:
          state: the prototypes of the round before.
          sent: by the clients of this round.
          key: of what is random, which nothing is.
        """
        del key
        count = jnp.asarray(sent.count, jnp.float32)[..., None]
        total = jnp.sum(count, axis=0)
        weight = count / jnp.maximum(total, 1)[None]
        mean = jnp.sum(jnp.where(count > 0, weight * sent.mean, 0), axis=0)
        value = jnp.where(total > 0, mean, state.value)
        return GlobalPrototypes(value, state.known | (total[:, 0] > 0)), {}
