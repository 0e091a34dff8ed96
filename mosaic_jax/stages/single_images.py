"""Prototypes that are the features of one image, which thus leave the client.

Part of the audit. It needs no features: how many images of a class a client has, and
how many centres are asked of k-means, tell enough.
"""

import dataclasses
import logging

import numpy as np

from mosaic_jax.core.types import Array
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import Context, Outcome

_log = logging.getLogger(__name__)

COLUMN = "prototypes of one image"
MEANING = (
    "share of the clients' prototypes, at least, that are the features of a single"
    " image: the mean of a class of one image, or centres of about as many images"
)


def count(label_count: Array, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """How many prototypes there are, and how many of these are one image's features.

    Fewer images of a class than centres have one prototype, their mean. With no fewer,
    no cluster is empty unless images are equal, so that of n images in k clusters at
    least 2 k - n have a cluster of their own: all of them where n = k.

    Args:
      label_count: [C, K] int, images of each class at each client.
      num_clusters: k, centres of a class.

    Returns:
      Prototypes, and at least how many are of one image, [C, K] int each.
    """
    held = np.asarray(label_count)
    few = held < num_clusters
    made = np.where(few, np.minimum(held, 1), num_clusters)
    return made, np.where(few, held == 1, np.maximum(2 * num_clusters - held, 0))


def added(context: Context, found: Outcome) -> Outcome:
    """What else the audit found, and which prototypes are features of one image.

    Args:
      context: of the stage, which declares "prototypes.clusters".
      found: by the audit so far.

    Returns:
      `found` with results, a headline number and a column of the clients more, and a
      sentence in its section.
    """
    clusters = context.settings.prototypes.clusters
    number = context.data.clients.client.number.tolist()
    made, single = count(context.data.label_count, clusters)
    each = dict(zip(number, single.sum(axis=1).tolist(), strict=True))
    total = dict(zip(number, made.sum(axis=1).tolist(), strict=True))
    share = float(single.sum() / made.sum())
    told = (
        f"at least {single.sum()} of {made.sum()} prototypes ({100 * share:.1f} %) are"
        " the features of a single image"
    )
    if share:
        told += f", of {sections.named([client for client in number if each[client]])}"
        _log.warning("audit: %s", told)
    rows = [
        {
            "client": client,
            "prototypes": total[client],
            "single_images": each[client],
            "single_images_of_class": of_class,
        }
        for client, of_class in zip(number, single.tolist(), strict=True)
    ]
    exact = {"mean": share, "low": share, "high": share, "meaning": MEANING}
    blocks = found.section.blocks if found.section else ()
    told = f"{told[0].upper()}{told[1:]}."
    column = {client: f"{each[client]} of {total[client]}" for client in number}
    return dataclasses.replace(
        found,
        results=found.results | {"prototypes": rows},
        headline=found.headline | {"single_image_prototypes": exact},
        clients=found.clients | {COLUMN: column},
        section=sections.Section("Audit", (*blocks, sections.Text(told))),
    )
