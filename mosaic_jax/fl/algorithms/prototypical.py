"""What FedProto and FedTGP share: clients exchange class prototypes, and no models."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm, without_mean
from mosaic_jax.fl.class_means import ClassMeans, GlobalPrototypes, pooled
from mosaic_jax.fl.holdings import shares
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.nn import losses


@dataclasses.dataclass(frozen=True)
class Prototypical(Algorithm):
    """Every client keeps its own model, whose features follow global prototypes.

    A client adds to its loss `attraction` times the mean squared distance of its
    features to the global prototypes of their labels, and sends the class means of its
    features; the server makes the global prototypes of them. Networks need nothing in
    common: features are pooled to the number that the narrowest has.

    A method of this kind overrides the last three hooks. Clients that sent no mean of a
    class must not count in it, and the order of clients must not matter.
    """

    exchanges = "prototypes"
    personal = True

    attraction: float = schema.at_least(
        0, default=1.0, meaning="lambda, of the distance to the global prototypes"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Whatever needs the mean of the clients' models, and networks left out."""
        yield from without_mean(study, "whose rounds end in no global model")
        some, networks = study.init.clients_per_round, study.networks
        clients = np.arange(study.data.num_clients)
        sizes = [len(clients[i :: len(networks)]) for i in range(len(networks))]
        for name, count in zip(networks, shares(sizes, some), strict=True):
            if some and not count:
                yield (
                    f"init.clients_per_round = {some}: must be larger: no client with"
                    f" the network {name!r} would take part"
                )

    def init_client(self, model: ModelState) -> Tree:
        """The client's own model."""
        return model

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """`attraction` times the mean over images and features of squared distances.

        Images of classes without a global prototype count as 0.
        """
        del params
        prototypes: GlobalPrototypes = seen.turn.server
        label = seen.batch.label
        own = pooled(seen.features, prototypes.value.shape[-1])
        square = jnp.mean((own - prototypes.value[label]) ** 2, axis=-1)
        square = jnp.where(prototypes.known[label], square, 0)
        return self.attraction * losses.masked_mean(square, seen.batch.mask)

    @abc.abstractmethod
    def init_prototypes(
        self, key: jax.Array, num_classes: int, num_features: int
    ) -> Tree:
        """What the server keeps between rounds, before the first one.

        Args:
          key: random key of this state.
          num_classes: K.
          num_features: F.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def prototypes(self, state: Tree) -> GlobalPrototypes:
        """What is sent to the clients, of the state of the round before."""
        raise NotImplementedError

    @abc.abstractmethod
    def learn(
        self, state: Tree, sent: ClassMeans, key: jax.Array
    ) -> tuple[Tree, dict[str, Array]]:
        """The server's part of a round.

        Args:
          state: of the round before.
          sent: by the clients that took part.
          key: random key of this round.

        Returns:
          The new state, and scalar metrics by name.
        """
        raise NotImplementedError

    def learn_flops(
        self, num_clients: int, num_classes: int, num_features: int
    ) -> float:
        """FLOPs of `learn`, counted as in `core.flops`; 0 without a network.

        Args:
          num_clients: m, that take part.
          num_classes: K.
          num_features: F.
        """
        del num_clients, num_classes, num_features
        return 0.0
