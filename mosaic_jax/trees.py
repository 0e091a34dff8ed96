"""Pytree arithmetic on a leading axis, and names, sizes and digests of trees."""

import hashlib
from collections.abc import Sequence

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.types import Array, Tree


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack equal trees along a new leading axis."""
    return jax.tree.map(lambda *leaves: _stack(leaves), *trees)


def _stack(leaves: Sequence[Array]) -> Array:
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key):
        return jnp.stack(leaves)
    # jax's check that no key is drawn from twice takes joining keys for a draw.
    data = jnp.stack([jax.random.key_data(key) for key in leaves])
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaves[0]))


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Join equal trees along their leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def take(tree: Tree, index: int | Array) -> Tree:
    """Entry (or entries) `index` of the leading axis of each leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def broadcast(tree: Tree, size: int) -> Tree:
    """Repeat each leaf `size` times along a new leading axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), tree)


def zeros(shapes: Tree) -> Tree:
    """Zeros of the shapes and types of the leaves."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def add(a: Tree, b: Tree) -> Tree:
    """Leaf-wise sum."""
    return jax.tree.map(jnp.add, a, b)


def select(condition: Array, on_true: Tree, on_false: Tree) -> Tree:
    """Leaf-wise choice between two trees by one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def weighted_mean(tree: Tree, weight: Array) -> Tree:
    """Mean over the leading axis [C, ...] with non-negative `weight` [C], normalised.

    An entry of weight 0 is left out even where it is not finite.
    """
    weight = weight / jnp.sum(weight)

    def mean(leaf: Array) -> Array:
        w = weight.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
        return jnp.sum(jnp.where(w > 0, w * leaf, 0), axis=0)

    return jax.tree.map(mean, tree)


def num_bytes(tree: Tree) -> int:
    """Bytes that the leaves take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def all_finite(tree: Tree) -> Array:
    """[] bool: every floating-point entry is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def flatten(tree: Tree) -> dict[str, Array]:
    """Map 'a/b/c' paths to leaves, for any mix of dicts, tuples and dataclasses."""
    state = flax.serialization.to_state_dict(tree)
    if not isinstance(state, dict):
        return {"": state}
    return flax.traverse_util.flatten_dict(state, sep="/")


def digest(tree: Tree) -> str:
    """sha256 over names, shapes, dtypes and bytes of all leaves."""
    result = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(leaf)
        result.update(f"{name}:{array.shape}:{array.dtype};".encode())
        result.update(array.data if array.size else b"")
    return result.hexdigest()
