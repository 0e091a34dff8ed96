"""Shadow models: clients that train on random halves of what attackers are asked of.

Shadows are clients as all others, on the axis of clients. Each has all that its client
trained on and no attacker is asked of, and a random half of the rest, members or not.
It does what its client does in a round, from a model that the server knows: the same
number of steps of SGD with the settings `local`, private where the study is. What an
algorithm adds to that loss, shadows leave out.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mosaic_jax.core import prng, trees
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Client, FederatedDataset, LabelledImages, ModelState
from mosaic_jax.fl import membership, workload
from mosaic_jax.stages import local
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.candidates import Candidates


def train(
    context: Context,
    images: LabelledImages,
    clients: Sequence[Candidates],
    count: int,
    model: ModelState,
    suffix: str,
) -> Run:
    """Train the shadows of clients with one network.

    Args:
      context: of the stage, for the clients with this network.
      images: of `candidates.every_image`.
      clients: whose shadows they are.
      count: S, shadows of each, even.
      model: that they start from.
      suffix: of the network's names.

    Returns:
      Models [C S, ...], those of the first client first; and what each was trained on
      of its client's candidates, [S, N] bool for each client.
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
    axis, size = context.axis.of(len(held)), np.asarray(data.client.size)
    steps = np.asarray(workload.planned_steps(context.settings.local, size))
    models = yield from local.train(
        dataclasses.replace(
            context,
            data=dataclasses.replace(context.data, clients=data),
            clients=axis.place(data, whole=True),
            axis=axis,
        ),
        f"shadows{suffix}",
        trees.broadcast(model, len(held)),
        np.broadcast_to(steps, size.shape),
        key=prng.named(context.key, "shadows"),
    )
    return models, inside


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
