"""Class means of features: what clients with unlike networks send in place of models.

A client keeps its model from round to round. While it trains it gathers the mean of its
features over the images of each class, and its loss may look at the global prototypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core.types import Array, Batch, Client, ModelState, Struct, Tree
from mosaic_jax.fl.client_program import Result, Traffic, Turn
from mosaic_jax.fl.local_sgd import LocalSGD


class GlobalPrototypes(Struct):
    """One point for each class, `value` [K, F]; `known` [K] bool: there is one."""

    value: Array
    known: Array


class ClassMeans(Struct):
    """What m clients sent.

    `mean` [m, K, F] are means of their features, and `count` int32 [m, K] the images of
    each class that they hold; 0 where they sent no mean. `number` int32 [m] identifies
    the clients.
    """

    mean: Array
    count: Array
    number: Array


class Own(Struct):
    """What a client keeps between rounds: its model, and what it sent last.

    `mean` [K, F] and `count` int32 [K] are an entry of `ClassMeans`.
    """

    model: ModelState
    mean: Array
    count: Array


def pooled(features: Array, count: int) -> Array:
    """Features [..., F] averaged to `count` <= F numbers, [..., count].

    Number i is the mean of the features from floor(i F / count) up to, and without,
    ceil((i + 1) F / count), as PyTorch's AdaptiveAvgPool1d has it.
    """
    width = features.shape[-1]
    if width == count:
        return features
    ends = np.arange(count + 1) * width
    first, last = ends[:-1] // count, -(-ends[1:] // count)
    place = np.arange(width)[:, None]
    share = ((first <= place) & (place < last)) / (last - first)
    return features @ share.astype(np.float32)


def nearest(features: Array, prototypes: GlobalPrototypes) -> Array:
    """Minus the squared distances of features [B, F] to all prototypes, [B, K].

    They are -inf for classes without one.
    """
    own = pooled(features, prototypes.value.shape[-1])
    distance = jnp.sum((own[:, None] - prototypes.value[None]) ** 2, axis=-1)
    return jnp.where(prototypes.known[None], -distance, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class GatheringSGD(LocalSGD):
    """Local SGD from the client's own model, which sends class means of features.

    They are those of the minibatches of the round, as each was met in training.

    Attributes:
      num_features: F, to which features are pooled.
      num_classes: K.
    """

    num_features: int = 0
    num_classes: int = 0

    def init(self, turn: Turn) -> Tree:
        """Model and optimiser; sums of features [K, F] and their numbers [K]."""
        model = turn.state.model
        sums = jnp.zeros((self.num_classes, self.num_features))
        opt_state = self.optimizer(turn, 0).init(model.params)
        return (model, opt_state), sums, jnp.zeros(self.num_classes)

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step on cross-entropy and penalty.

        Args:
          turn: of the client; `turn.server` are the global prototypes.
          carry: as of `init`.
          batch: images [B, H, W, D] in [-1, 1], labels and mask [B].
          step: [] int32, within the round.

        Returns:
          The new carry, and the loss [] without the penalty.
        """
        trained, sums, seen = carry
        trained, loss, features = self.train(turn, trained, batch, step)
        member = jax.nn.one_hot(batch.label, self.num_classes) * batch.mask[:, None]
        features = jnp.where(batch.mask[:, None], features, 0)
        sums += member.T @ pooled(features, self.num_features)
        return (trained, sums, seen + jnp.sum(member, axis=0)), loss

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """The client keeps all; the server reads the means there, and sums nothing.

        Args:
          turn: of the client.
          carry: of the last step.
          loss: [] mean over the steps.
        """
        del loss
        (model, _), sums, seen = carry
        mean = sums / jnp.maximum(seen, 1)[:, None]
        count = jnp.where(seen > 0, turn.client.label_count, 0)
        return Result((), model, Own(model, mean, count))

    def traffic(self, image_shape: tuple[int, int, int], client: Client) -> Traffic:
        """A mean and a number for each class that the client holds; all prototypes.

        Args:
          image_shape: (H, W, D).
          client: with the counts of its classes.
        """
        del image_shape
        held = int(np.sum(np.asarray(client.label_count) > 0))
        down = self.num_classes * (4 * self.num_features + 1)
        return Traffic(held * 4 * (self.num_features + 1), down)
