"""Narrow networks within a wide one: which channels, cutting out and putting back.

A channel space is a set of channels that several layers share (`ResNet.widths`). A
narrow network keeps some channels of each space. Put back among zeros it is the same
function of its input: a channel whose scale, shift, mean and variance in batch-norm and
whose kernels are 0 stays 0 through every layer, and so does its gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from mosaic_jax.types import Array, ModelState, Tree

# Layer to the spaces of its kernel's last two axes, the last of which is that of its
# vectors too; None: never narrowed.
Spaces = Mapping[str, tuple[str | None, str | None]]
# Channels that are kept of a space; one that is not there is whole.
Channels = Mapping[str, Array]
# The classifier's outputs: never narrowed, but a client may lack classes.
CLASSES = "classes"
# Weights of clients sum to 1 up to this.
_ROUNDING = 1e-6


@flax.struct.dataclass
class Part:
    """What a client holds of a wide `value`: zero elsewhere; `share` 1 there, else 0.

    Leaves of `share` have size 1 on axes along which it does not differ. Weighted sums
    of both over clients give `merge` what it needs.
    """

    value: Tree
    share: Tree


def kept(width: int, rate: float) -> int:
    """Channels of a layer of `width` at `rate`: the ceiling of their product."""
    return math.ceil(round(rate * width, 9))


def cut(model: ModelState, spaces: Spaces, channels: Channels) -> ModelState:
    """The narrow network of `channels`."""

    def one(leaf: Array, axes: tuple[str | None, ...]) -> Array:
        for axis, space in enumerate(axes):
            if space in channels:
                leaf = jnp.take(leaf, channels[space], axis=axis)
        return leaf

    return _map(one, spaces, model)


def paste(
    model: ModelState, spaces: Spaces, channels: Channels, widths: Mapping[str, int]
) -> ModelState:
    """Inverse of `cut`: the wide network of `widths` that is zero elsewhere."""
    # A gather from the narrow network; XLA has no fast scatter on CPUs.
    source = {
        space: jnp.full(widths[space], len(index)).at[index].set(jnp.arange(len(index)))
        for space, index in channels.items()
    }

    def one(leaf: Array, axes: tuple[str | None, ...]) -> Array:
        for axis, space in enumerate(axes):
            if space in source:
                leaf = jnp.take(
                    leaf, source[space], axis=axis, mode="fill", fill_value=0
                )
        return leaf

    return _map(one, spaces, model)


def masks(channels: Channels, widths: Mapping[str, int]) -> Channels:
    """1.0 for each channel [width] of every space that is kept, else 0.0."""
    return {
        space: jnp.zeros(width).at[channels[space]].set(1.0)
        if space in channels
        else jnp.ones(width)
        for space, width in widths.items()
    }


def first_channels(
    widths: Mapping[str, int], rates: Sequence[float]
) -> dict[str, Array]:
    """`masks` [C, width] of clients that hold the first channels at their rates."""
    return {
        space: jnp.stack(
            [(jnp.arange(width) < kept(width, rate)).astype(float) for rate in rates]
        )
        for space, width in widths.items()
    }


def held(model: ModelState, spaces: Spaces, masks: Channels) -> ModelState:
    """1 where a network of the shapes of `model` is held, else 0; see `Part`."""

    def one(leaf: Array, axes: tuple[str | None, ...]) -> Array:
        result = jnp.ones([1] * leaf.ndim)
        for axis, space in enumerate(axes):
            if space in masks:
                shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
                result = result * masks[space].reshape(shape)
        return result

    return _map(one, spaces, model)


def within(model: Tree, share: Tree) -> Tree:
    """The narrow network of `share` among zeros."""
    return jax.tree.map(jnp.multiply, model, share)


def num_bytes(model: Tree, share: Tree) -> int:
    """Bytes of what all clients hold; leaves of both are [C, ...]."""
    return sum(
        round(leaf.size / one.size * float(jnp.sum(one))) * leaf.dtype.itemsize
        for leaf, one in zip(
            jax.tree.leaves(model), jax.tree.leaves(share), strict=True
        )
    )


def merge(part: Part, otherwise: Tree) -> Tree:
    """Means over those who hold a parameter; `otherwise` where nobody does.

    Args:
      part: sums over clients, with weights that sum to 1.
      otherwise: wide.
    """

    def one(value: Array, share: Array, old: Array) -> Array:
        # Undivided where all hold it: then this is the plain weighted mean.
        share = jnp.where(share > 1 - _ROUNDING, 1.0, share)
        return jnp.where(share > 0, value / jnp.where(share > 0, share, 1.0), old)

    return jax.tree.map(one, part.value, part.share, otherwise)


def _map(
    function: Callable[[Array, tuple[str | None, ...]], Array],
    spaces: Spaces,
    model: ModelState,
) -> ModelState:
    """`function(leaf, space of each axis)` over parameters and statistics."""

    def collection(tree: Tree) -> Tree:
        flat = flax.traverse_util.flatten_dict(tree)
        return flax.traverse_util.unflatten_dict(
            {
                path: function(leaf, _axes(spaces, path, leaf))
                for path, leaf in flat.items()
            }
        )

    return ModelState(collection(model.params), collection(model.batch_stats))


def _axes(spaces: Spaces, path: tuple[str, ...], leaf: Array) -> tuple[str | None, ...]:
    pair = spaces["/".join(path[:-1])]
    return pair[1:] if leaf.ndim == 1 else (*[None] * (leaf.ndim - 2), *pair)
