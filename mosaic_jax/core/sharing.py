"""Batches that all devices of a study share: each computes its part of them.

A program of the server is written for whole batches. Where it makes one, it says by
`spread` that the samples may lie on different devices, and XLA divides all that follows
from them: each device has its part of the activations, and sums over the batch, such as
gradients and the moments of batch-norm, are those of the whole batch. So results are
those of one device up to rounding.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mosaic_jax.core.types import Tree

_mesh: contextvars.ContextVar[Mesh | AbstractMesh | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def over(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Within it, programs are traced for batches that the devices of a mesh share.

    Args:
      mesh: with one axis; None: a batch is the work of one device, as that of a client
        is.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def num_devices() -> int:
    """Number of devices that share a batch."""
    mesh = _mesh.get()
    return mesh.size if mesh else 1


def multiple(count: int) -> int:
    """The least number of samples >= `count` that `spread` divides."""
    return -(-count // num_devices()) * num_devices()


def spread(tree: Tree, axis: int = 0) -> Tree:
    """The same arrays, each device with an equal part of one axis, the samples.

    Where its length is no multiple of the number of devices, an array stays as it is.

    Args:
      tree: leaves [B, ...].
      axis: that is divided.
    """
    mesh = _mesh.get()
    if mesh is None:
        return tree
    divided = NamedSharding(mesh, PartitionSpec(*[None] * axis, *mesh.axis_names))

    def divide(leaf: jax.Array) -> jax.Array:
        if leaf.shape[axis] % mesh.size:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, divided)

    return jax.tree.map(divide, tree)


def gather(tree: Tree) -> Tree:
    """The same arrays, whole on every device."""
    layout = everywhere()
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, layout)


def everywhere() -> NamedSharding | None:
    """The layout of arrays that every device has; None: there is one device."""
    mesh = _mesh.get()
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())
