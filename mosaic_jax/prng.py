"""Random keys by name: one seed, folded by purpose, step and client.

A key depends only on what it is for, never on what ran before it, so resuming,
reusing a stage, padding or sharding cannot shift any draw.
"""

import zlib

import jax

from mosaic_jax.types import Array


def root(seed: int) -> Array:
    """The typed key that everything derives from."""
    return jax.random.key(seed)


def named(key: Array, name: str) -> Array:
    """The stream of `key` for the purpose `name`."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def at(key: Array, *counters: int | Array) -> Array:
    """Fold step, client, ... counters into `key`, in this order."""
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key
