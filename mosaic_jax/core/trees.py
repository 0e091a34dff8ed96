"""Arithmetic on pytrees of arrays, and their names, sizes and digests."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from mosaic_jax.core import errors
from mosaic_jax.core.types import Array, Tree


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of the same structure and shapes along a new leading axis."""
    return jax.tree.map(lambda *leaves: _stack(leaves), *trees)


def _stack(leaves: Sequence[Array]) -> Array:
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key):
        return jnp.stack(leaves)
    # JAX's check for reused keys would count stacking them as a use.
    data = jnp.stack([jax.random.key_data(key) for key in leaves])
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaves[0]))


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees of the same structure along their leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def take(tree: Tree, index: int | slice | Array) -> Tree:
    """Entry or entries `index` of the leading axis of each leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def broadcast(tree: Tree, size: int) -> Tree:
    """Repeat each leaf `size` times along a new leading axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), tree)


@jax.custom_batching.custom_vmap
def any_entry(flag: Array) -> Array:
    """Whether `flag` [] holds for any of the entries that `vmap` runs together.

    The result is the same for all of them, so that a `lax.cond` on it stays a branch.
    """
    return flag


@any_entry.def_vmap
def _(count: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
    del count, batched
    return any_entry(jnp.any(flag, axis=0)), False


def zeros(shapes: Tree) -> Tree:
    """Zeros with the shapes and types of the leaves of `shapes`."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def shape(shape: tuple[int, ...], dtype: DTypeLike) -> Tree:
    """An array's shape and type, for a container that stands for its shapes only."""
    return jax.ShapeDtypeStruct(shape, dtype)


def add(a: Tree, b: Tree) -> Tree:
    """Leaf-wise sum."""
    return jax.tree.map(jnp.add, a, b)


def total(terms: Tree) -> jax.Array:
    """Sum of the leaves, which have the same shape."""
    return jnp.asarray(sum(jax.tree.leaves(terms)))


def select(condition: Array, on_true: Tree, on_false: Tree) -> Tree:
    """Choose between two trees by one condition.

    Args:
      condition: [] bool.
      on_true: the result where it holds.
      on_false: the result otherwise; of the same structure and shapes.
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def weighted_mean(tree: Tree, weight: Array) -> Tree:
    """Weighted mean over the leading axis of leaves [C, ...].

    `weight` [C] is not negative and need not sum to 1. Entries of weight 0 are left out
    even where they are not finite.
    """
    weight = weight / jnp.sum(weight)

    def mean(leaf: Array) -> Array:
        w = weight.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
        return jnp.sum(jnp.where(w > 0, w * leaf, 0), axis=0)

    return jax.tree.map(mean, tree)


def running_mean(mean: Tree, new: Tree, decay: float, number: Array) -> Tree:
    """Exponential running mean after one more entry, free of what it started at.

    Args:
      mean: of the `number` entries before, whose weights add up to 1; the first entry
        replaces it.
      new: the entry.
      decay: in (0, 1), weight of an entry relative to that of the next.
      number: [] int, of entries before.

    Reference: the debiased form of Kingma and Ba, 2015, as a recursion.
    """
    weight = (1 - decay) / (1 - decay ** (number + 1.0))
    return optax.incremental_update(new, mean, weight)


def num_bytes(tree: Tree) -> int:
    """Bytes of memory of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def all_finite(tree: Tree) -> jax.Array:
    """Whether every floating-point entry is finite, [] bool."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not leaves:
        return jnp.array(True)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def flatten(tree: Tree) -> dict[str, Array]:
    """Leaves by path 'a/b/c', for any mix of dicts, tuples and dataclasses."""
    state = flax.serialization.to_state_dict(tree)
    if not isinstance(state, dict):
        return {"": state}
    leaves: Any = flax.traverse_util.flatten_dict(state, sep="/")
    return leaves


def digest(tree: Tree) -> str:
    """Hex sha256 over names, shapes, types and bytes of all leaves.

    A leaf that need not fit in memory has `blocks()`, its parts along the leading axis.
    """
    result = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        in_blocks = hasattr(leaf, "blocks")
        whole: Any = leaf if in_blocks else np.ascontiguousarray(leaf)
        result.update(f"{name}:{whole.shape}:{whole.dtype};".encode())
        for block in whole.blocks() if in_blocks else [whole]:
            result.update(block.data if block.size else b"")
    return result.hexdigest()


def restore_into(template: Tree, flat: Mapping[str, Array]) -> Tree:
    """Put arrays named by path into the structure of `template`.

    Args:
      template: arrays or shapes; an axis of -1 may have any length.
      flat: arrays by path, as `flatten` names them.

    Raises:
      CheckpointError: names, shapes or dtypes differ from the template's.
    """
    expected = flatten(template)
    for name in sorted(expected.keys() | flat.keys()):
        if not _is_like(expected.get(name), flat.get(name)):
            raise errors.CheckpointError(
                f"{name}: saved {_kind(flat.get(name))}, expected"
                f" {_kind(expected.get(name))}"
            )
    state = _fill(flax.serialization.to_state_dict(template), flat, "")
    return flax.serialization.from_state_dict(template, state)


def replaced(tree: Tree, arrays: Mapping[str, Array]) -> Tree:
    """`tree` with other leaves at some paths, as `flatten` names them.

    Raises:
      CheckpointError: there is no such leaf, or it has another shape or type.
    """
    return restore_into(tree, flatten(tree) | dict(arrays))


def _is_like(template: Any, leaf: Any) -> bool:
    if template is None or leaf is None or -1 not in template.shape:
        return _kind(template) == _kind(leaf)
    lengths = zip(template.shape, leaf.shape, strict=False)
    fits = len(template.shape) == len(leaf.shape)
    return (
        fits
        and template.dtype == leaf.dtype
        and all(wanted in (-1, found) for wanted, found in lengths)
    )


def _kind(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _fill(state: Any, flat: Mapping[str, Array], path: str) -> Any:
    if not isinstance(state, dict):
        return flat[path]
    prefix = f"{path}/" if path else ""
    return {key: _fill(value, flat, prefix + key) for key, value in state.items()}
