"""Narrow networks within a wide one: cutting them out and putting them back.

A channel space is a set of channels that several layers share (`ResNet.widths`). A
narrow network has some of the channels of each space. Padded with zeros to the wide
shapes it remains the same function of its input: a channel whose kernels and whose
scale, shift, mean and variance in batch-norm are 0 is 0 in every layer, and so is its
gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from mosaic_jax.core.types import Array, ModelState, Struct, Tree

# Layer to the channel spaces of the last two axes of its kernel; its vectors, such as
# biases, have the space of the last. None: an axis that is never narrowed.
Spaces = Mapping[str, tuple[str | None, str | None]]
# Space to the channels of it that a narrow network has; of a space that is missing here
# it has all.
Channels = Mapping[str, Array]
# The space of the classifier's outputs: never narrowed, but masked for classes that a
# client lacks.
CLASSES = "classes"
# The weights of all clients sum to 1 up to this error.
_ROUNDING = 1e-6


class Part(Struct):
    """The parameters of a wide network that a client trains.

    `value` is 0 for parameters that it does not have; `mask` is 1 for those that it has
    and 0 for others, with size 1 on axes along which it is constant. `merge` takes
    weighted sums of both over clients.
    """

    value: Tree
    mask: Tree


def kept(width: int, rate: float) -> int:
    """Number of channels that a layer of `width` keeps at `rate`: ceil(rate width)."""
    return math.ceil(round(rate * width, 9))


def cut(model: ModelState, spaces: Spaces, channels: Channels) -> ModelState:
    """Cut a narrow network out of a wide one.

    Args:
      model: the wide network.
      spaces: channel spaces of its layers.
      channels: of the narrow network, by space.
    """

    def one(leaf: Array, axes: tuple[str | None, ...]) -> Array:
        for axis, space in enumerate(axes):
            if space is not None and space in channels:
                leaf = jnp.take(leaf, channels[space], axis=axis)
        return leaf

    return _map(one, spaces, model)


def paste(
    model: ModelState, spaces: Spaces, channels: Channels, widths: Mapping[str, int]
) -> ModelState:
    """Inverse of `cut`: pad a narrow network with zeros.

    Args:
      model: the narrow network.
      spaces: channel spaces of its layers.
      channels: that it has, by space.
      widths: number of channels of each space in the wide network.
    """
    # Written as a gather: XLA has no fast scatter on CPUs.
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


def masks(channels: Channels, widths: Mapping[str, int]) -> dict[str, Array]:
    """Mask [width] of each space: 1.0 for `channels`, else 0.0."""
    return {
        space: jnp.zeros(width).at[channels[space]].set(1.0)
        if space in channels
        else jnp.ones(width)
        for space, width in widths.items()
    }


def first_channels(
    widths: Mapping[str, int], rates: Sequence[float]
) -> dict[str, Array]:
    """`masks` [C, width] of C clients that have the first channels at their `rates`."""
    return {
        space: jnp.stack(
            [(jnp.arange(width) < kept(width, rate)).astype(float) for rate in rates]
        )
        for space, width in widths.items()
    }


def held(model: ModelState, spaces: Spaces, masks: Channels) -> ModelState:
    """The mask of the parameters that a client has; see `Part`.

    Args:
      model: a network with the wide shapes.
      spaces: channel spaces of its layers.
      masks: [width] 1.0 for channels that the client has, else 0.0, by space.
    """

    def one(leaf: Array, axes: tuple[str | None, ...]) -> Array:
        result = jnp.ones([1] * leaf.ndim)
        for axis, space in enumerate(axes):
            if space is not None and space in masks:
                shape = [-1 if i == axis else 1 for i in range(leaf.ndim)]
                result = result * masks[space].reshape(shape)
        return result

    return _map(one, spaces, model)


def within(model: Tree, mask: Tree) -> Tree:
    """`model` with zeros for the parameters that are not in `mask`, see `Part`."""
    return jax.tree.map(jnp.multiply, model, mask)


def num_bytes(model: Tree, mask: Tree) -> int:
    """Bytes of the parameters in `mask` of all clients; leaves of both are [C, ...]."""
    return sum(
        round(leaf.size / one.size * float(jnp.sum(one))) * leaf.dtype.itemsize
        for leaf, one in zip(jax.tree.leaves(model), jax.tree.leaves(mask), strict=True)
    )


def merge(part: Part, otherwise: Tree) -> Tree:
    """Average each parameter over the clients that have it (Diao et al., 2021).

    Args:
      part: sums of the clients' `Part`s, with weights that sum to 1.
      otherwise: network with the values of parameters that no client has.
    """

    def one(value: Array, weight: Array, old: Array) -> Array:
        # Not divided where all clients have it, so that it is the plain weighted mean.
        weight = jnp.where(weight > 1 - _ROUNDING, 1.0, weight)
        return jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1.0), old)

    return jax.tree.map(one, part.value, part.mask, otherwise)


def _map(
    function: Callable[[Array, tuple[str | None, ...]], Array],
    spaces: Spaces,
    model: ModelState,
) -> ModelState:
    """`function(leaf, space of each axis)` over parameters and statistics."""

    def collection(tree: Tree) -> Tree:
        flat: Any = flax.traverse_util.flatten_dict(tree)
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
