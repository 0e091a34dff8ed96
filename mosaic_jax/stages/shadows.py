"""Shadow models: clients that train on random halves of what attackers are asked of.

Shadows are clients as all others, on the axis of clients. Each has all that its client
trained on and no attacker is asked of, and a random half of the rest, members or not.
It does what its client does in a round, from a model that the server knows: the same
number of steps of SGD with the settings `local`, private where the study is. What an
algorithm adds to that loss, shadows leave out. Where asked to, each trains a GAN as
well, with its own classifier, as a client with these images does: steps by epochs and
the bound of the inversion loss go by their number, which is smaller than its client's.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mosaic_jax.core import prng, trees
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
)
from mosaic_jax.fl import membership, workload
from mosaic_jax.stages import generators, local
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.candidates import Candidates


@dataclasses.dataclass(frozen=True)
class Shadows:
    """The shadows of clients with one network, S of each, those of the first first.

    Attributes:
      context: of the stage, with the shadows as its clients.
      suffix: of the network's names.
      inside: for each client [S, N] bool, what of its candidates each trained on.
    """

    context: Context
    suffix: str
    inside: list[np.ndarray]

    def models(self, model: ModelState) -> Run:
        """Train classifiers, as a client does in a round.

        Args:
          model: that they start from.

        Returns:
          Models [C S, ...].
        """
        context = self.context
        size = np.asarray(context.data.clients.client.size)
        steps = np.asarray(workload.planned_steps(context.settings.local, size))
        return local.train(
            context,
            f"shadows{self.suffix}",
            trees.broadcast(model, len(size)),
            np.broadcast_to(steps, size.shape),
            key=prng.named(context.key, "shadows"),
        )

    def generators(self, models: ModelState, model: ModelState) -> Run:
        """Train GANs, as clients do.

        Args:
          models: of `models`.
          model: the global one.

        Returns:
          Generators [C S, ...].
        """
        trained = yield from generators.train(
            self.context, f"shadow generators{self.suffix}", models, model
        )
        return generators.uploaded(trained, self.context.settings.generators)

    def each(self, models: ModelState) -> list["Shade"]:
        """What belongs to the shadows of each client.

        Args:
          models: leaves [C S, ...].
        """
        ends = np.cumsum([len(halves) for halves in self.inside])
        return [
            Shade(halves, trees.take(models, slice(end - len(halves), end)))
            for halves, end in zip(self.inside, ends, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Shade:
    """The S shadows of one client.

    Attributes:
      inside: [S, N] bool, what of its candidates each trained on.
      model: classifiers or generators, leaves [S, ...].
    """

    inside: np.ndarray
    model: ModelState


def of_clients(
    context: Context,
    images: LabelledImages,
    clients: Sequence[Candidates],
    count: int,
    suffix: str,
) -> Shadows:
    """The shadows of clients with one network.

    Args:
      context: of the stage, for the clients with this network.
      images: of `candidates.every_image`.
      clients: whose shadows they are.
      count: S, shadows of each, even.
      suffix: of the network's names.
    """
    seed = context.settings.seed
    inside = [
        membership.halves(
            np.random.RandomState([seed, one.client]), count, len(one.row)
        )
        for one in clients
    ]
    held = [
        np.concatenate([one.rest, one.row[half]]).astype(int)
        for one, halves in zip(clients, inside, strict=True)
        for half in halves
    ]
    data = _dataset(context, images, held, clients, count)
    axis = context.axis.of(len(held))
    shown = dataclasses.replace(
        context,
        data=dataclasses.replace(context.data, clients=data),
        clients=axis.place(data, whole=True),
        axis=axis,
    )
    return Shadows(shown, suffix, inside)


def _dataset(
    context: Context,
    images: LabelledImages,
    held: Sequence[np.ndarray],
    clients: Sequence[Candidates],
    count: int,
) -> FederatedDataset:
    """The shadows' data: `held` are the numbers of each one's images."""
    longest = max(len(rows) for rows in held)
    label = np.asarray(images.label)
    classes = context.data.info.num_classes
    own = context.data.clients.client
    numbers = np.asarray(own.number).tolist()
    of = np.repeat([numbers.index(one.client) for one in clients], count)
    number = np.repeat([one.client for one in clients], count) * count
    return FederatedDataset(
        images=images,
        client=Client(
            number=(number + np.arange(len(held)) % count).astype(np.int32),
            index=np.stack([np.resize(rows, longest) for rows in held]).astype(
                np.int32
            ),
            size=np.array([len(rows) for rows in held], np.int32),
            label_count=np.stack(
                [np.bincount(label[rows], minlength=classes) for rows in held]
            ).astype(np.int32),
            noise=jax.tree.map(lambda noise: np.asarray(noise)[of], own.noise),
        ),
    )
