"""Prototypes that clients send in every round, of the model as they receive it.

As the published code has them: a client passes the minibatches that it is about to
train on through the model that it has just received, clusters their features by class,
and sends the centres with its upload.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, trees
from mosaic_jax.core.types import (
    Array,
    Client,
    FederatedDataset,
    Gathered,
    LabelledImages,
    ModelState,
    Struct,
    Tree,
)
from mosaic_jax.fl import prototypes, training
from mosaic_jax.nn import submodel
from mosaic_jax.stages import federation
from mosaic_jax.stages.base import Blueprint, Context
from mosaic_jax.stages.rounds import Rounds


class Room(Struct):
    """Room for the prototypes of R rounds of C clients, at most S of each in a round.

    `feature` is float32 [R, C, S, F], `label` int32 [R, C, S], -1 where there is none.
    """

    feature: Array
    label: Array


@dataclasses.dataclass(frozen=True)
class Gathering:
    """What clients send along in the rounds of a stage.

    Attributes:
      context: of the stage.
      program: of its rounds.
      rounds: how many there are, R.
      first: number of the first one, over the study.
    """

    context: Context
    program: Rounds
    rounds: int
    first: int

    def empty(self) -> Room:
        """The room before the first round."""
        info = self.context.data.info
        images = self.program.local.steps * self.program.local.batch_size
        # No more than there are clusters, or images.
        each = min(images, info.num_classes * self._clusters)
        shape = self.rounds, self.program.axis.num_clients, each
        width = self.context.classifier.num_features(info.image_shape)
        return Room(jnp.zeros((*shape, width)), jnp.full(shape, -1, jnp.int32))

    def add(
        self,
        room: Room,
        data: FederatedDataset,
        key: jax.Array,
        model: ModelState,
        number: Array,
        at: Array,
    ) -> Room:
        """The room with the prototypes of one round; a pure function.

        Args:
          room: before the round.
          data: of all clients.
          key: random key of all rounds.
          model: global, as it is sent.
          number: [] int32, number of the round, over the study.
          at: [] int32, its place in the room.
        """
        model = self.program.usable(data, key, model)
        mask = None
        if self.context.rates:
            mask = federation.trained_masks(self.context, model, number)
        feature, label = self.program.axis.map(
            self._of_client,
            data.client,
            mask,
            shared=(model, key, number),
            placed=(data.images,),
        )
        takes_part = jnp.zeros(len(label), bool)
        for who in self.program.participation.participants(key, number):
            takes_part = takes_part.at[who].set(True)
        label = jnp.where(takes_part[:, None], label, -1)
        return jax.tree.map(
            lambda all_rounds, now: all_rounds.at[at].set(now),
            room,
            Room(feature, label),
        )

    def _of_client(
        self,
        client: Client,
        mask: ModelState | None,
        model: ModelState,
        key: jax.Array,
        number: Array,
        images: LabelledImages,
    ) -> tuple[Array, Array]:
        """One client's prototypes in a round: features [S, F], labels [S]."""
        local, info = self.program.local, self.context.data.info
        if mask is not None:
            model = submodel.within(model, mask)
        # Those of the client's turn, by the same keys.
        batch_at = training.client_batches(
            client,
            images,
            number * local.steps,
            local.steps,
            key=key,
            batch_size=local.batch_size,
            augmentation=self.program.augmentation,
        )

        def of_batch(step: Array) -> tuple[Array, Array, Array]:
            batch = batch_at(step)
            feature = self.context.classifier.features(model, batch.image)
            return feature, batch.label, batch.mask

        found = jax.lax.map(of_batch, jnp.arange(local.steps))
        feature, label, held = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in found)
        count = {"num_classes": info.num_classes, "num_clusters": self._clusters}
        cluster, held = prototypes.cluster_classes(
            prng.at(prng.named(key, "prototypes"), number, client.number),
            feature,
            label,
            held,
            num_steps=self.context.settings.prototypes.iterations,
            **count,
        )
        centre = prototypes.centres(feature, label, cluster, **count)
        slots = min(len(feature), held.size)
        filled = held.reshape(-1)
        rows = jnp.argsort(~filled, stable=True)[:slots]
        label = jnp.where(filled[rows], rows // self._clusters, -1)
        return centre.reshape(-1, centre.shape[-1])[rows], label.astype(jnp.int32)

    @property
    def _clusters(self) -> int:
        return self.context.settings.prototypes.clusters

    def gathered(self, room: Room) -> Gathered:
        """The prototypes of all rounds, round by round and client by client."""
        labels = programs.jit(lambda room: room.label, assumed=self._assumed)
        label = np.asarray(labels(room))
        rows = np.nonzero(label >= 0)
        number, client, _ = rows
        return Gathered(
            feature=np.asarray(room.feature)[rows],
            label=label[rows],
            client=np.asarray(self.context.clients.client.number)[client],
            round=(self.first + number).astype(np.int32),
        )

    def _assumed(self, args: Tree, results: Tree) -> np.ndarray:
        """Labels where nothing is run: by the classes' shares of a client's images."""
        del args
        client, local = self.context.data.clients.client, self.program.local
        images = local.steps * local.batch_size
        label = np.full(results.shape, -1, np.int32)
        for i, count in enumerate(np.asarray(client.label_count)):
            many = images * count / max(count.sum(), 1) >= self._clusters
            each = np.where(many, self._clusters, np.minimum(count, 1))
            found = np.repeat(np.arange(len(count)), each)[: label.shape[-1]]
            label[:, i, : len(found)] = found
        return label

    def traffic(self, found: Gathered) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that clients send, and receive, on account of the prototypes."""
        width = found.feature.shape[-1] * found.feature.itemsize
        up = {"prototypes": len(found.label) * (width + found.label.itemsize)}
        if not self.program.holdings.recalibrates:
            return up, {}
        # The model that is sent has no statistics to be read by.
        shape = self.context.data.info.image_shape
        query = self.rounds * self.program.query_bytes(shape)
        return up | {"moments": query.up}, {"queried_models": query.down}


def template(blueprint: Blueprint) -> Gathered:
    """Shapes and types of what is gathered."""
    width = blueprint.classifier.num_features(blueprint.data.info.image_shape)
    number = trees.shape((-1,), jnp.int32)
    return Gathered(trees.shape((-1, width), jnp.float32), number, number, number)


def flops_of_round(blueprint: Blueprint) -> float:
    """FLOPs of the features of all clients' minibatches of a round."""
    data, local = blueprint.data, blueprint.settings.local
    images = data.clients.num_clients * local.steps * local.batch_size
    forward = blueprint.classifier.flops(data.info.image_shape)
    return images * forward + federation.query_flops(blueprint)
