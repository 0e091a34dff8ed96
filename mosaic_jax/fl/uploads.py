"""What may become of uploads: attacks, compression and rules, each a frozen dataclass.

Attacks and compression change parameters alone. Statistics of batch-norm and single
numbers, such as FedNova's counts of gradients, are sent as they are: they are few, and
a variance must not become negative.
"""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array, Tree

# Of an upload, in the order of its leaves.
Parameters = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Attack(schema.Group):
    """What attackers do; a new one is a frozen dataclass that overrides a function."""

    # Attackers know each other's updates: these are kept, as for a robust rule.
    colludes = False

    def labels(self, label: np.ndarray, num_classes: int) -> np.ndarray:
        """Labels [n] that attackers' images have, in place of the true ones."""
        del num_classes
        return label

    def updates(self, update: Parameters, attackers: Array, key: Array) -> Parameters:
        """What attackers send in place of their updates.

        Args:
          update: of m clients, leaves [m, ...]; m is 1 unless the attack `colludes`,
            and all participants of the round if it does.
          attackers: [m] bool; what the rows of others become does not matter.
          key: random key [] of the round, and of the client where m is 1.

        Returns:
          Leaves like those of `update`.
        """
        del attackers, key
        return update

    @property
    def changes_updates(self) -> bool:
        """Whether it is one on updates."""
        return type(self).updates is not Attack.updates


@dataclasses.dataclass(frozen=True)
class Compressor(schema.Group):
    """From an array to a message and back; a new one overrides both functions."""

    # Whether clients keep what is left out, and add it to the next update.
    error_feedback = False

    @abc.abstractmethod
    def encode(self, array: Array, key: Array) -> Tree:
        """The arrays that are sent, whose shapes depend on that of `array` alone.

        Args:
          array: [n] float32, one of an update's arrays, flattened.
          key: random key [] of this client, round and array.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def decode(self, message: Tree, size: int) -> Array:
        """What the server reads [n] float32.

        Args:
          message: of `encode`.
          size: n.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rule(schema.Group):
    """From the uploads of a round to one; a new rule overrides both functions."""

    # Sums over clients do not do: the uploads are kept one by one.
    needs_each = True
    # It goes by the number of attackers that it is told; else by the clients alone.
    is_told = True

    @abc.abstractmethod
    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """What the algorithm aggregates in place of the weighted mean.

        Args:
          upload: of m participants, leaves [m, ...].
          weight: [m] of the algorithm, such as their numbers of images; those of
            weight 0, whose upload may not have arrived, must not count, whatever their
            values.
          attackers: how many of the others the rule must withstand.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def most_attackers(self, clients: int) -> int:
        """How many attackers it can withstand among a round's `clients`."""
        raise NotImplementedError


def parameters(upload: Tree) -> Parameters:
    """The leaves of an upload that are parameters, or changes of them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(upload)
    return tuple(leaf for path, leaf in leaves if _is_parameter(path, leaf))


def with_parameters(upload: Tree, new: Sequence[Tree]) -> Tree:
    """An upload with `new` in place of its `parameters`."""
    rest = iter(new)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: next(rest) if _is_parameter(path, leaf) else leaf, upload
    )


def update_of(upload: Tree, reference: Tree) -> Parameters:
    """How far the parameters of an upload are from those of a reference."""
    pairs = zip(parameters(upload), parameters(reference), strict=True)
    return tuple(sent - known for sent, known in pairs)


def updated(upload: Tree, reference: Tree, update: Parameters) -> Tree:
    """An upload with parameters that are an update away from those of a reference.

    Args:
      upload: whose other leaves it has.
      reference: like it.
      update: in the order of their `parameters`.
    """
    pairs = zip(parameters(reference), update, strict=True)
    return with_parameters(upload, tuple(known + change for known, change in pairs))


def problems(study: Any, told: str, instead: str) -> Iterator[str]:
    """A line where clients do not send the upload of a whole network.

    Args:
      study: its settings.
      told: the setting, with its value, that needs them to.
      instead: what the setting must be otherwise.
    """
    if not study.sends_whole_uploads:
        yield (
            f"{told}: must be {instead} for init.method = {study.init.method!r}, whose"
            " clients send prototypes or parts of the network, or run programs of"
            " their own"
        )


def _is_parameter(path: tuple, leaf: Array) -> bool:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_float and leaf.ndim > 0 and "batch_stats" not in names
