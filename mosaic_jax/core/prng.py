"""Random keys by name: one seed, folded by purpose, step and client.

A key depends only on what it is for, never on what ran before it, so resuming,
reusing a stage, padding or sharding cannot shift any draw.
"""

import zlib

import jax

from mosaic_jax.core.types import Array


def root(seed: int) -> jax.Array:
    """The typed key [] from which a study derives all others."""
    return jax.random.key(seed)


def named(key: Array, name: str) -> jax.Array:
    """The key [] that `key` gives for the purpose `name`."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def at(key: Array, counter: int | Array, *further: int | Array) -> jax.Array:
    """The key [] that `key` gives for counters such as step and client.

    Args:
      key: random key.
      counter: [] int32, folded in first.
      further: [] int32 each, folded in next, in this order.
    """
    result = jax.random.fold_in(key, counter)
    for one in further:
        result = jax.random.fold_in(result, one)
    return result
