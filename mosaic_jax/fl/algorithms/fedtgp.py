"""FedTGP (Zhang et al., 2024): the server trains the global prototypes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core import flops, schema, trees
from mosaic_jax.core.types import Array, Struct, Tree
from mosaic_jax.fl import training
from mosaic_jax.fl.algorithms.prototypical import Prototypical
from mosaic_jax.fl.class_means import ClassMeans, GlobalPrototypes
from mosaic_jax.nn import losses
from mosaic_jax.nn.prototype_network import PrototypeNetwork

# Of squared distances: the root has no gradient at 0.
_LEAST = 1e-12


class TGPState(Struct):
    """Parameters of the server's network, and the prototypes that it made of them."""

    params: Tree
    prototypes: GlobalPrototypes


@dataclasses.dataclass(frozen=True)
class FedTGP(Prototypical):
    """A network on the server makes global prototypes that lie apart.

    It is trained by SGD on the class means that clients sent: each is classified by its
    Euclidean distances to the prototypes of all classes, with `margin` added to that of
    its own class. The margin is the distance of a class's centre, the plain mean of its
    class means, to the nearest other centre, of the class where it is largest; at most
    `max_margin`.
    """

    server_work = "every round, prototypes"

    attraction: float = schema.at_least(
        0, default=10.0, meaning="lambda, of the distance to the global prototypes"
    )
    epochs: int = schema.at_least(
        1, default=100, meaning="S, of the server over the class means of a round"
    )
    batch_size: int = schema.at_least(1, default=10, meaning="class means in a step")
    learning_rate: float = schema.above(0, default=0.01, meaning="of the server's SGD")
    max_margin: float = schema.above(0, default=100.0, meaning="tau")

    def init_prototypes(
        self, key: jax.Array, num_classes: int, num_features: int
    ) -> TGPState:
        """An initial network, which nobody uses yet.

        Args:
          key: of its parameters.
          num_classes: K.
          num_features: F.
        """
        network = PrototypeNetwork(num_classes, num_features)
        params = network.init(key)["params"]
        value = jnp.zeros((num_classes, num_features))
        return TGPState(params, GlobalPrototypes(value, jnp.zeros(num_classes, bool)))

    def prototypes(self, state: TGPState) -> GlobalPrototypes:
        """Those of all classes, once the network was trained."""
        return state.prototypes

    def learn(
        self, state: TGPState, sent: ClassMeans, key: jax.Array
    ) -> tuple[TGPState, dict[str, Array]]:
        """Epochs of SGD over the class means, then new prototypes.

        Args:
          state: of the round before.
          sent: by the clients of this round.
          key: of the order of the class means.
        """
        # Clients in the order of their numbers, whatever the order they came in.
        sent = trees.take(sent, jnp.argsort(sent.number))
        num_classes, num_features = sent.mean.shape[1:]
        network: Any = PrototypeNetwork(num_classes, num_features)
        margin = jnp.minimum(margin_of(sent), self.max_margin)
        there = sent.count.reshape(-1) > 0
        mean = jnp.where(there[:, None], sent.mean.reshape(-1, num_features), 0)
        label = jnp.tile(jnp.arange(num_classes), len(sent.count))
        # Those that were sent come first.
        rows, count = jnp.argsort(~there, stable=True), jnp.sum(there)
        size = min(self.batch_size, len(rows))

        def epoch(number: Array, carry: Tree) -> Tree:
            order = training.epoch_order(key, number, count, len(rows))

            def step(j: Array, carry: Tree) -> Tree:
                params, _ = carry
                slot = j * size + jnp.arange(size)
                row = rows[order[jnp.minimum(slot, len(rows) - 1)]]

                def objective(params: Tree) -> Array:
                    prototype = network.apply({"params": params})
                    return contrast(
                        mean[row], label[row], slot < count, prototype, margin
                    )

                loss, gradient = jax.value_and_grad(objective)(params)
                return jax.tree.map(
                    lambda old, slope: old - self.learning_rate * slope,
                    params,
                    gradient,
                ), loss

            return jax.lax.fori_loop(0, -(-count // size), step, carry)

        start = (state.params, jnp.zeros(()))
        params, loss = jax.lax.fori_loop(0, self.epochs, epoch, start)
        value = network.apply({"params": params})
        known = jnp.full(num_classes, count > 0) | state.prototypes.known
        made = TGPState(params, GlobalPrototypes(value, known))
        return made, {"server_loss": loss, "margin": margin}

    def learn_flops(
        self, num_clients: int, num_classes: int, num_features: int
    ) -> float:
        """FLOPs of a round in which every client sends every class.

        Args:
          num_clients: who send.
          num_classes: K.
          num_features: F.
        """
        steps = self.epochs * -(-num_clients * num_classes // self.batch_size)
        layers = 2 * num_classes * num_features**2
        distances = min(self.batch_size, num_clients * num_classes) * num_classes
        return 2.0 * flops.TRAINED * steps * (layers + distances * num_features)


def margin_of(sent: ClassMeans) -> Array:
    """The largest distance [] between a class's centre and the nearest other one.

    0 where fewer than two classes were sent.
    """
    there = sent.count > 0
    number = jnp.sum(there, axis=0)
    total = jnp.sum(jnp.where(there[..., None], sent.mean, 0), axis=0)
    centre = total / jnp.maximum(number, 1)[:, None]
    distance = jnp.sqrt(jnp.sum((centre[:, None] - centre[None]) ** 2, axis=-1))
    pair = (
        (number > 0)[:, None] & (number > 0)[None] & ~jnp.eye(len(number), dtype=bool)
    )
    near = jnp.min(jnp.where(pair, distance, jnp.inf), axis=1)
    return jnp.max(jnp.where(jnp.isfinite(near), near, 0))


def contrast(
    mean: Array, label: Array, mask: Array, prototype: Array, margin: Array
) -> Array:
    """Mean cross-entropy of classifying class means by their distances.

    Args:
      mean: [B, F].
      label: [B] int32, their classes.
      mask: [B] bool, those that count.
      prototype: [K, F].
      margin: [] >= 0, added to the distance to the prototype of the own class.
    """
    square = jnp.sum((mean[:, None] - prototype[None]) ** 2, axis=-1)
    distance = jnp.sqrt(jnp.maximum(square, _LEAST))
    distance += margin * jax.nn.one_hot(label, len(prototype))
    return losses.cross_entropy(-distance, label, mask)
