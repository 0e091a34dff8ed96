"""Who takes part in a round, whose uploads arrive, and how much each counts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Array, Client
from mosaic_jax.fl import workload
from mosaic_jax.fl.holdings import Group, shares
from mosaic_jax.fl.training import Local


class Turnout(NamedTuple):
    """Who takes part in one round, m clients of several groups.

    Attributes:
      participants: numbers of those of each group, ascending.
      arrived: [m] bool, whether their uploads arrive; None: all do.
      weight: [m] float32, of each in the mean, 0 where nothing arrives.
      total: [] sum of these.
      share: `total` as part of the weight of all clients of the study, in [0, 1].
    """

    participants: list[Array]
    arrived: jax.Array | None
    weight: Array
    total: Array
    share: Any  # a float, which a program knows as an array

    @property
    def who(self) -> jax.Array:
        """Numbers [m] of all of them, group by group."""
        return jnp.concatenate(self.participants)


@dataclasses.dataclass(frozen=True)
class Participation:
    """Draws the participants of each round.

    Attributes:
      groups: clients that are batched together, each with its share of the places.
      count: participants m in a round, at most all clients.
      local: how often clients fail.
      weigh: weights, in every mean over clients, of those with so many images.
    """

    groups: Sequence[Group]
    count: int
    local: Local
    weigh: Callable[[Array], Array]

    @property
    def everyone(self) -> bool:
        """Whether all clients take part in every round."""
        return self.count >= sum(len(group.members) for group in self.groups)

    @property
    def counts(self) -> list[int]:
        """Number of participants of each group, in proportion to its size.

        The numbers are rounded so that they sum to `count`.
        """
        return shares([len(group.members) for group in self.groups], self.count)

    def participants(self, key: jax.Array, number: int | Array) -> list[Array]:
        """Participants of round `number` for each group, in ascending order.

        Args:
          key: random key of all rounds.
          number: [] int32, number of the round, over the study.
        """
        if self.everyone:
            return [jnp.asarray(group.members) for group in self.groups]
        draw = prng.at(prng.named(key, "participants"), number)
        return [
            jnp.sort(jax.random.permutation(prng.at(draw, i), group.members)[:count])
            for i, (group, count) in enumerate(
                zip(self.groups, self.counts, strict=True)
            )
        ]

    def turnout(self, client: Client, key: jax.Array, number: int | Array) -> Turnout:
        """Who takes part in round `number`.

        Args:
          client: all clients, leaves [C, ...].
          key: random key of all rounds.
          number: [] int32, number of the round, over the study.
        """
        participants = self.participants(key, number)
        who = jnp.concatenate(participants)
        every = jnp.asarray(self.weigh(client.size))
        weight, arrived = every[who], None
        if self.local.failures:
            arrived = jax.vmap(
                lambda one: workload.arrives(self.local, one, key, number)
            )(trees.take(client, who))
            weight = jnp.where(arrived, weight, 0)
        total = jnp.sum(weight)
        certain = self.everyone and arrived is None
        share = 1.0 if certain else total / jnp.sum(every)
        weight = weight.astype(jnp.float32)
        return Turnout(participants, arrived, weight, total, share)
