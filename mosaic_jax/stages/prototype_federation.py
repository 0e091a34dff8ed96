"""Federated rounds in which clients with unlike networks exchange class prototypes."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT
from mosaic_jax.core.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Struct,
    Tree,
)
from mosaic_jax.fl import evaluation, parallel
from mosaic_jax.fl.algorithms.prototypical import Prototypical
from mosaic_jax.fl.class_means import (
    ClassMeans,
    GatheringSGD,
    GlobalPrototypes,
    Own,
    nearest,
)
from mosaic_jax.fl.client_program import Traffic
from mosaic_jax.fl.holdings import WholeNetwork, shares
from mosaic_jax.fl.training import Local
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.rounds import Metrics, Rounds, first_diverged

# How a client's model answers: by its head, or by the nearest global prototype.
ANSWERS = ("own", "prototype")
# In the place of a global model.
NO_MODEL = ModelState({}, {})


class FederationState(Struct):
    """Everything that the next round starts from.

    `server` is the state of the algorithm, `client` a tuple: the `Own` of the clients
    of each network, leaves [m, ...]. `last_round` int32 [C] is the round that each
    client last took part in, counted over the study, -1 before its first.
    """

    server: Tree
    client: tuple[Own, ...]
    last_round: Array


@dataclasses.dataclass(frozen=True)
class OwnNetworks(WholeNetwork):
    """Every client trains a network of its own and sends class means of its features.

    Attributes:
      num_features: F, to which features are pooled.
      num_classes: K.
    """

    num_features: int = 0
    num_classes: int = 0

    def program(self, rate: float, local: Local) -> GatheringSGD:
        """Local SGD that gathers class means; `rate` is 1."""
        del rate
        return GatheringSGD(
            self.classifier,
            self.algorithm,
            local,
            num_features=self.num_features,
            num_classes=self.num_classes,
        )


@dataclasses.dataclass(frozen=True)
class PrototypeFederation:
    """The program of rounds that end in prototypes.

    With partial participation, or several networks, every device must hold all images.

    Attributes:
      algorithm: of clients and server.
      classifiers: the networks.
      members: numbers of the clients with each of them, ascending.
      local: number and size of a client's minibatches in a round, and its SGD.
      axis: the layout of all clients on the devices.
      augmentation: of the clients' images, a name of `augment.AUGMENTATIONS`.
      image_shape: (H, W, D).
      num_classes: K.
      clients_per_round: participants, drawn anew each round; 0: all clients. Every
        network has its share of them, at least one.
    """

    algorithm: Prototypical
    classifiers: Sequence[Classifier]
    members: Sequence[np.ndarray]
    local: Local
    axis: parallel.ClientAxis
    augmentation: str
    image_shape: tuple[int, int, int]
    num_classes: int
    clients_per_round: int = 0

    @functools.cached_property
    def num_features(self) -> int:
        """F, the number of features that all networks have in common."""
        return common_features(self.classifiers, self.image_shape)

    @functools.cached_property
    def parts(self) -> list[Rounds]:
        """The rounds of the clients of each network."""
        sizes = [len(members) for members in self.members]
        counts = shares(sizes, self.clients_in_round)
        return [
            Rounds(
                algorithm=self.algorithm,
                holdings=OwnNetworks(
                    classifier,
                    self.algorithm,
                    size,
                    num_features=self.num_features,
                    num_classes=self.num_classes,
                ),
                local=self.local,
                axis=self.axis_of(size),
                augmentation=self.augmentation,
                keep_models=False,
                clients_per_round=count,
            )
            for classifier, size, count in zip(
                self.classifiers, sizes, counts, strict=True
            )
        ]

    def axis_of(self, count: int) -> parallel.ClientAxis:
        """The layout of so many clients in a round."""
        return self.axis if count == self.axis.num_clients else self.axis.of(count)

    @property
    def clients_in_round(self) -> int:
        """Number of participants m in a round."""
        return self.clients_per_round or self.axis.num_clients

    def initial_state(
        self, models: Sequence[ModelState], key: jax.Array
    ) -> FederationState:
        """The state before the first round, see the function of this name."""
        counts = [len(members) for members in self.members]
        shape = (self.num_classes, self.num_features)
        return initial_state(self.algorithm, models, counts, shape, key)

    def participants(self, key: jax.Array, number: Array) -> list[Array]:
        """Rows of those who take part in round `number`, among each network's clients.

        With a single network they are those of every other algorithm.
        """
        return [
            part.participation.participants(prng.at(key, i) if i else key, number)[0]
            for i, part in enumerate(self.parts)
        ]

    def run(
        self,
        data: FederatedDataset,
        key: jax.Array,
        state: FederationState,
        number: Array,
    ) -> tuple[FederationState, Array, Metrics]:
        """Round `number`, a pure function.

        Args:
          data: of all clients.
          key: random key of all rounds.
          state: after the round before.
          number: [] int32, number of the round, over the study.

        Returns:
          The new state; the mean loss [m] of each participant, NaN if it diverged; and
          metrics: those of the server, and `DIVERGED_CLIENT`, the number of the first
          client that diverged or -1.
        """
        prototypes = self.algorithm.prototypes(state.server)
        participants = self.participants(key, number)
        found = [
            self.turns(
                i,
                data.replace(client=trees.take(data.client, jnp.asarray(who)[rows])),
                key,
                prototypes,
                trees.take(own, rows),
                number,
            )
            for i, (who, own, rows) in enumerate(
                zip(self.members, state.client, participants, strict=True)
            )
        ]
        state = state.replace(
            client=tuple(
                jax.tree.map(lambda old, new, at=rows: old.at[at].set(new), own, new)
                for own, (new, _), rows in zip(
                    state.client, found, participants, strict=True
                )
            )
        )
        sent = [(new.mean, new.count) for new, _ in found]
        loss = jnp.concatenate([loss for _, loss in found])
        state, metrics = self.finish(state, data, sent, loss, participants, key, number)
        return state, loss, metrics

    def turns(
        self,
        i: int,
        data: FederatedDataset,
        key: jax.Array,
        prototypes: GlobalPrototypes,
        own: Own,
        number: Array,
    ) -> tuple[Own, Array]:
        """The turns of m clients of network `i` in a round.

        Args:
          i: number of the network.
          data: of these clients.
          key: random key of all rounds.
          prototypes: as they were sent.
          own: of these clients, leaves [m, ...].
          number: [] int32, number of the round, over the study.

        Returns:
          What they keep, and their losses [m].
        """
        part = self.parts[i]
        axis, client = self.axis_of(data.num_clients), data.client
        sent, total = (NO_MODEL, prototypes, {}, {}, ()), jnp.ones(())
        kept = own, ()
        (new, _, _), loss, _, _ = part.clients(
            axis, data, key, sent, client, kept, number, total
        )
        return new, loss

    def finish(
        self,
        state: FederationState,
        data: FederatedDataset,
        sent: Sequence[tuple[Array, Array]],
        loss: Array,
        participants: Sequence[Array],
        key: jax.Array,
        number: Array,
    ) -> tuple[FederationState, Metrics]:
        """The server's part of a round.

        Args:
          state: with what the clients keep.
          data: of all clients.
          sent: means [m, K, F] and counts [m, K] of each network's participants.
          loss: [m] of all participants.
          participants: rows of each network's.
          key: random key of all rounds.
          number: [] int32, number of the round, over the study.

        Returns:
          The new state, and metrics.
        """
        place = jnp.concatenate(
            [
                jnp.asarray(members)[rows]
                for members, rows in zip(self.members, participants, strict=True)
            ]
        )
        mean, count = trees.concatenate(sent)
        who = jnp.asarray(data.client.number)[place]
        server, metrics = self.algorithm.learn(
            state.server,
            ClassMeans(mean, count, who),
            prng.at(prng.named(key, "server"), number),
        )
        last_round = jnp.asarray(state.last_round).at[place].set(number)
        state = state.replace(server=server, last_round=last_round)
        return state, metrics | {DIVERGED_CLIENT: first_diverged(loss, who)}

    def accuracies(
        self,
        i: int,
        model: ModelState,
        prototypes: GlobalPrototypes,
        rows: dict[str, Array],
        held_out: dict[str, LabelledImages],
        batch_size: int,
    ) -> dict[str, dict[str, Array]]:
        """How good the models of m clients of network `i` are, each on its own images.

        Args:
          i: number of the network.
          model: of these clients, leaves [m, ...].
          prototypes: the global ones.
          rows: [m, n] int32 by held-out set, the images that each client is judged on.
          held_out: images and labels by the name of the set.
          batch_size: images in a batch.

        Returns:
          Accuracies [m] by set and by how a model answers, see `ANSWERS`.
        """
        classifier = self.classifiers[i]

        def of_client(
            model: ModelState,
            rows: dict[str, Array],
            prototypes: GlobalPrototypes,
            held_out: dict[str, LabelledImages],
        ) -> dict[str, dict[str, Array]]:
            def answers(image: Array) -> dict[str, Array]:
                features = classifier.features(model, image)
                answered = (
                    classifier.head(model, features),
                    nearest(features, prototypes),
                )
                return dict(zip(ANSWERS, answered, strict=True))

            def on(images: LabelledImages, rows: Array) -> dict[str, Array]:
                found = evaluation.predict(
                    answers, images.image[rows], batch_size=batch_size
                )
                return {
                    how: evaluation.accuracy(scores, images.label[rows])
                    for how, scores in found.items()
                }

            return {name: on(held_out[name], rows[name]) for name in held_out}

        axis = self.axis_of(len(jax.tree.leaves(rows)[0]))
        return axis.map(of_client, model, rows, shared=(prototypes, held_out))

    def round_bytes(self, clients: Client) -> Traffic:
        """Bytes that all participants of a round send and receive.

        Where some take part, what they send is the mean over draws.

        Args:
          clients: all clients, leaves [C, ...].
        """
        total, share = Traffic(0, 0), self.clients_in_round / self.axis.num_clients
        for part, members in zip(self.parts, self.members, strict=True):
            program = part.program(1.0)
            for i in members:
                total += program.traffic(self.image_shape, trees.take(clients, i))
        return Traffic(round(share * total.up), round(share * total.down))


def common_features(
    classifiers: Iterable[Classifier], image_shape: tuple[int, int, int]
) -> int:
    """Number of features of the narrowest network, for images of `image_shape`."""
    return min(one.num_features(image_shape) for one in classifiers)


def initial_state(
    algorithm: Prototypical,
    models: Sequence[ModelState],
    counts: Sequence[int],
    shape: tuple[int, int],
    key: jax.Array,
) -> FederationState:
    """The state before the first round.

    Args:
      algorithm: of clients and server.
      models: the initial model of each network, the same for all its clients.
      counts: number of clients with each of them.
      shape: (K, F), of the prototypes.
      key: of all rounds.
    """
    own = Own(NO_MODEL, jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32))
    return FederationState(
        server=algorithm.init_prototypes(prng.named(key, "server"), *shape),
        client=tuple(
            trees.broadcast(own.replace(model=model), count)
            for model, count in zip(models, counts, strict=True)
        ),
        last_round=jnp.full(sum(counts), -1, jnp.int32),
    )
