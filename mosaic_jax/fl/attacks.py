"""Attacks by a share of the clients: on their labels, or on the updates they send.

An update is what a client sends minus the reference that the server knows: of a model,
the change of its parameters (`fl/uploads.py`). Attackers are drawn once for a study.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, schema
from mosaic_jax.core.registry import Registry, build, subclass_of
from mosaic_jax.core.types import Array
from mosaic_jax.fl import uploads
from mosaic_jax.fl.uploads import Attack, Parameters


@dataclasses.dataclass(frozen=True)
class LabelFlip(Attack):
    """Label y of K classes becomes K - 1 - y (Fang et al., USENIX Security 2020).

    Nothing of the study knows better: local training, generators, prototypes and label
    counts are by the false labels.
    """

    def labels(self, label: np.ndarray, num_classes: int) -> np.ndarray:
        """The classes in reverse."""
        return num_classes - 1 - label


@dataclasses.dataclass(frozen=True)
class Scaled(Attack):
    """The update times a factor; a large one replaces the model (Bagdasaryan, 2020)."""

    factor: float = schema.anything(-10.0, meaning="that attackers' updates have")

    def updates(self, update: Parameters, attackers: Array, key: Array) -> Parameters:
        """Each by itself."""
        del attackers, key
        return jax.tree.map(lambda leaf: self.factor * leaf, update)


@dataclasses.dataclass(frozen=True)
class SignFlip(Attack):
    """The update with the other sign (Li et al., RSA, AAAI 2019)."""

    def updates(self, update: Parameters, attackers: Array, key: Array) -> Parameters:
        """Each by itself."""
        del attackers, key
        return jax.tree.map(jnp.negative, update)


@dataclasses.dataclass(frozen=True)
class Gaussian(Attack):
    """Noise in place of the update (Blanchard et al., 2017, who have deviation 200)."""

    deviation: float = schema.above(0, default=1.0, meaning="of every parameter")

    def updates(self, update: Parameters, attackers: Array, key: Array) -> Parameters:
        """Each by itself."""
        del attackers
        return tuple(
            self.deviation * jax.random.normal(prng.at(key, i), leaf.shape, leaf.dtype)
            for i, leaf in enumerate(update)
        )


@dataclasses.dataclass(frozen=True)
class ALIE(Attack):
    """A little is enough (Baruch et al., NeurIPS 2019): `mean - z deviation` from all.

    Mean and deviation of each coordinate are over the attackers' own updates. With
    z = 0 it is the largest one with which, were updates normal, attackers and the
    honest clients that are further off are a majority: of m uploads, f of attackers,
    `Phi(z) = (m - f - s) / (m - f)` with `s = floor(m / 2 + 1) - f`. That probability
    is kept within [0.5, 0.99].
    """

    colludes = True

    z: float = schema.at_least(
        0, default=0.0, meaning="deviations from the mean; 0: by the numbers of clients"
    )

    def updates(self, update: Parameters, attackers: Array, key: Array) -> Parameters:
        """The same from every attacker."""
        del key
        count = jnp.sum(attackers)
        z = self.z or largest_z(len(attackers), count)

        def sent(leaf: Array) -> Array:
            own = attackers.reshape(-1, *[1] * (leaf.ndim - 1))
            mean = jnp.sum(jnp.where(own, leaf, 0), 0) / jnp.maximum(count, 1)
            square = jnp.where(own, (leaf - mean[None]) ** 2, 0)
            deviation = jnp.sqrt(jnp.sum(square, 0) / jnp.maximum(count, 1))
            return jnp.broadcast_to(mean - z * deviation, leaf.shape)

        return jax.tree.map(sent, update)


def largest_z(clients: int, attackers: Array) -> Array:
    """The z [] of ALIE for so many `attackers` [] among a round's `clients`."""
    honest = jnp.maximum(clients - attackers, 1)
    supporters = clients // 2 + 1 - attackers
    probability = jnp.clip((honest - supporters) / honest, 0.5, 0.99)
    return jax.scipy.special.ndtri(probability)


ATTACKS: Registry[type[Attack]] = Registry(
    "attack.name",
    {
        "label_flip": LabelFlip,
        "sign_flip": SignFlip,
        "scaled": Scaled,
        "gaussian": Gaussian,
        "alie": ALIE,
    },
    subclass_of(Attack),
)


@dataclasses.dataclass(frozen=True)
class Attackers(schema.Group):
    """Clients that attack the study."""

    name: str = schema.component(
        ("none", *ATTACKS), default="none", meaning="what attackers do"
    )
    share: float = schema.between(
        0,
        1,
        default=0.3,
        meaning="part of the clients who attack, if any do",
    )

    def build(self, methods: dict[str, Any]) -> Attack | None:
        """The attack, with its fields from `methods`; None: there is none.

        Raises:
          ConfigError: it is unknown, or a field of it is wrong.
        """
        return None if self.name == "none" else build(ATTACKS, self.name, methods)

    def number(self, num_clients: int) -> int:
        """How many of all clients attack."""
        return 0 if self.name == "none" else round(self.share * num_clients)

    def problems(self, study: Any) -> Iterator[str]:
        """Too few attackers; attacks on what is not sent, or not at hand at once."""
        attack = self.build(study.methods)
        if attack is None:
            return
        told, count = f"attack.name = {self.name!r}", study.data.num_clients
        # What one sends who colludes with nobody is what an honest client sends.
        least = 2 if attack.colludes else 1
        if self.number(count) < least:
            yield (
                f"attack.share = {self.share}: must be > {(least - 0.5) / count:g} for"
                f" {told}: {least} of data.num_clients = {count} must attack at least"
            )
        if not attack.changes_updates:
            return
        yield from uploads.problems(study, told, "none or label_flip")
        if attack.colludes and study.compression.name != "none":
            yield (
                f"{told}: must be another for compression.name ="
                f" {study.compression.name!r}: attackers would send what is not"
                " compressed"
            )
        if attack.colludes and study.compute.client_state == "host":
            yield (
                f"compute.client_state = 'host': must be auto or device for {told},"
                " whose attackers wait for each other"
            )


def drawn(key: Array, num_clients: int, count: int) -> Array:
    """Numbers [count] int32 of the clients that attack in all rounds of a study.

    Args:
      key: random key of all rounds.
      num_clients: C, of the study.
      count: how many of them attack.
    """
    order = jax.random.permutation(prng.named(key, "attackers"), num_clients)
    return jnp.sort(order[:count])
