"""The images that membership attacks are judged by, and what their scores tell.

An attacker is asked of each image whether a client trained on it. Half of them are the
client's; the others are test images of the same classes in the same numbers, so that
whoever knows what the client holds, but none of its images, is at chance. Canaries are
asked of too, and judged by themselves.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mosaic_jax.core.types import LabelledImages
from mosaic_jax.fl import membership
from mosaic_jax.stages import measures
from mosaic_jax.stages.base import Context

# False-positive rates that summaries tell the true-positive rate at.
LEVELS = {"0.1%": 0.001, "1%": 0.01}


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The N images that attackers are asked of for one client.

    Attributes:
      client: its number.
      row: [N] int, their numbers in `every_image`.
      label: [N] int32.
      inside: [N] bool, those that the client trained on.
      canary: [N] bool.
      rest: [R] int, all else that the client trained on.
    """

    client: int
    row: np.ndarray
    label: np.ndarray
    inside: np.ndarray
    canary: np.ndarray
    rest: np.ndarray


def every_image(context: Context) -> LabelledImages:
    """Training images, canaries and test images, in host memory, in this order."""
    train, test = context.data.clients.images, context.data.held_out["test"]
    return LabelledImages(
        np.concatenate([train.image, test.image]),
        np.concatenate([train.label, test.label]).astype(np.int32),
    )


def of_client(
    context: Context, images: LabelledImages, number: int, most: int
) -> Candidates:
    """What attackers are asked of one client.

    Args:
      context: of all clients; it shows "data.shift".
      images: of `every_image`.
      number: of the client.
      most: about the largest number of its images; classes are cut in proportion.
    """
    data, label = context.data, np.asarray(images.label)
    num_train = len(data.clients.images.label)
    planted = data.canaries
    coins = np.zeros(0, bool) if planted is None else planted.inside[number]
    first = num_train - (0 if planted is None else planted.label.size)
    own = np.asarray(data.parts[number])
    own = own[own < first]
    other = num_train + np.arange(len(data.held_out["test"].label))
    if context.settings.data.shift != "none":
        # Others would be told by the looks of their clients' images.
        other = num_train + np.asarray(data.test_index[number])
    inside, outside = measures.matched_rows(
        label[own],
        label[other],
        most,
        np.random.RandomState([context.settings.seed, number]),
    )
    canary = first + number * len(coins) + np.arange(len(coins))
    row = np.concatenate([own[inside], other[outside], canary]).astype(int)
    asked = len(inside) + len(outside)
    return Candidates(
        client=number,
        row=row,
        label=label[row],
        inside=np.concatenate([np.arange(asked) < len(inside), coins]),
        canary=np.arange(len(row)) >= asked,
        rest=np.setdiff1d(own, row),
    )


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an attacker makes of one client's candidates.

    Attributes:
      payload: what the client sent, that the attacker looked at.
      attack: how.
      of: the candidates.
      score: [N], the higher the likelier the client trained on the image.
    """

    payload: str
    attack: str
    of: Candidates
    score: np.ndarray


def judged(
    scores: Sequence[Scores], epsilon: Sequence[float], delta: float
) -> list[dict[str, Any]]:
    """What the scores tell, by payload and attack: of all clients, and of each.

    Args:
      scores: of all attacks on all clients.
      epsilon: [C] claimed for all that a client sends; empty: nothing is claimed.
      delta: with which epsilon is claimed, or would be.

    Returns:
      Rows of the summary, see `run.summary.Summary`.
    """
    groups = []
    for payload, attack in dict.fromkeys((one.payload, one.attack) for one in scores):
        group = [
            one for one in scores if (one.payload, one.attack) == (payload, attack)
        ]
        groups += [(None, group), *((one.of.client, [one]) for one in group)]
    rows = []
    for client, some in groups:
        payload, attack = some[0].payload, some[0].attack
        row = {"payload": payload, "attack": attack, "client": client}
        claimed = [epsilon[one.of.client] for one in some] if epsilon else []
        row["epsilon_claimed"] = max(claimed) if claimed else None
        rows.append(row | _found(some, delta, len(groups)))
    return rows


def _found(scores: Sequence[Scores], delta: float, among: int) -> dict[str, Any]:
    """Rates over members and others, and the bounds by canaries, of clients together.

    Args:
      scores: of these clients.
      delta: with which epsilon is claimed.
      among: bounds of the study.
    """
    member, other = (
        np.concatenate(
            [one.score[~one.of.canary & (one.of.inside == inside)] for one in scores]
        )
        for inside in (True, False)
    )
    found: dict[str, Any] = {"members": len(member), "others": len(other), "auc": None}
    if len(member):
        area = measures.auc(member, other).interval(0.0, 1.0)
        found["auc"] = {"value": area.pop("mean"), **area}
    found["tpr_at_fpr"] = {
        name: membership.true_positives(member, other, level)
        for name, level in LEVELS.items()
    }
    coins = sum(int(one.of.canary.sum()) for one in scores)
    found["canaries"] = coins
    found |= dict.fromkeys(("epsilon_lower", "epsilon_lower_together", "epsilon_reach"))
    if coins:
        guessed = []
        for share in membership.SHARES:
            each = [
                membership.guesses(
                    one.score[one.of.canary], one.of.inside[one.of.canary], share
                )
                for one in scores
            ]
            guessed.append((sum(n for n, _ in each), sum(v for _, v in each)))
        found["epsilon_lower"] = membership.bound(coins, guessed, delta)
        found["epsilon_lower_together"] = membership.bound(coins, guessed, delta, among)
        perfect = [(count, count) for count, _ in guessed]
        found["epsilon_reach"] = membership.bound(coins, perfect, delta)
    return found
