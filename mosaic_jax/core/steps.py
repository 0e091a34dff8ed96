"""Loops of pure training steps, which a stage yields to whoever runs the stage."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core import sharing, trees
from mosaic_jax.core.types import Array, Tree

# (args, state, first step, end step) -> (state, scalar metrics)
Chunk = Callable[[Tree, Tree, Any, Any], tuple[Tree, dict[str, Any]]]
# A stage in progress: yields `Steps`, is sent their final states, returns its outcome.
Run = Generator["Steps", Tree, Any]

# Name of the loops whose steps are federated rounds.
ROUND = "round"

# Scope of the loops over training steps: what is told of a program, traced or compiled,
# names them by it.
TRAINING = "training"

# Metrics of a chunk that are not plotted: where training stopped being finite.
DIVERGED_STEP, DIVERGED_CLIENT = "diverged_step", "diverged_client"


@dataclasses.dataclass
class Ended:
    """Where a loop ended before its last step: after `step` steps; None: it did not."""

    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """A loop that a stage asks for: `state = yield Steps(...)`.

    Attributes:
      name: of the loop, unique within its stage.
      chunk: pure function that runs the steps first, ..., end - 1. Whatever differs
        between seeds comes in `args`: arrays closed over are constants of the program.
      args: arrays that all steps read.
      state: before step 0.
      num_steps: of the whole loop.
      every: steps per chunk.
      samples_per_step: training samples, for the rate in the progress bar.
      together: whether the loop may be batched over seeds.
      on_host: `chunk` is not compiled as a whole but calls compiled functions; NumPy
        leaves of `state` stay in host memory.
      layout: digest of what a step's number means, where that depends on how the work
        is laid out; a state that was saved under another layout is of no use.
      pictures: from a state to uint8 images [rows, n, H, W, D] by name, for those who
        watch; None: there are none.
      ended: set by whoever runs the loop, if it ended early.
    """

    name: str
    chunk: Chunk
    args: Tree
    state: Tree
    num_steps: int
    every: int
    samples_per_step: int
    together: bool = True
    on_host: bool = False
    layout: str = ""
    pictures: Callable[[Tree], dict[str, Any]] | None = None
    ended: Ended = dataclasses.field(default_factory=Ended)

    @property
    def done(self) -> int:
        """Number of steps that were run, once the loop has ended."""
        return self.num_steps if self.ended.step is None else self.ended.step

    @property
    def stopped(self) -> dict[str, Any]:
        """For a stage's results: {"stopped": {"after", "of"}} if it ended early."""
        if self.ended.step is None:
            return {}
        return {"stopped": {"after": self.done, "of": self.num_steps}}


def train(
    first: int | Array,
    end: int | Array,
    body: Callable[[Array, Tree], Tree],
    start: Tree,
) -> Tree:
    """`jax.lax.fori_loop` over training steps, which costs are told of by the step.

    Args:
      first: [] int32, number of the first step.
      end: [] int32, number after the last step.
      body: `body(step, state) -> state`.
      start: state before step `first`.
    """
    with jax.named_scope(TRAINING):
        return jax.lax.fori_loop(first, end, body, start)


def repeat(
    body: Callable[[Array, Tree], tuple[Tree, dict[str, Array]]],
    state: Tree,
    first: Array,
    end: Array,
    *,
    mean: bool = True,
) -> tuple[Tree, dict[str, Array]]:
    """Run a chunk of steps that are all the same computation.

    Args:
      body: `body(step, state) -> (state, scalar metrics)`.
      state: before step `first`.
      first: [] int32, number of the first step.
      end: [] int32, number after the last step; > `first`.
      mean: whether metrics are averaged over the steps; otherwise they are those of the
        last step.

    Returns:
      The state after the last step, and the metrics. Added to them is `DIVERGED_STEP`,
      [] int32: the first step with metrics that are not finite, else -1. If `body`
      reports `DIVERGED_CLIENT`, that of this step is kept.
    """
    body = jax.jit(body, inline=True)  # traced once for its shapes and for the loop
    shapes = jax.eval_shape(body, first, state)[1]
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    nowhere = jnp.full((), -1, jnp.int32)
    client = zeros.pop(DIVERGED_CLIENT, None)
    if client is not None:
        client = nowhere

    def one(step: Array, carry: Tree) -> Tree:
        state, metrics, at, client = carry
        # Whole on every device, as the state is before the step.
        state, found = sharing.gather(body(step, state))
        named = found.pop(DIVERGED_CLIENT, None)
        now = (at < 0) & ~trees.all_finite(found)
        if named is not None:
            client = jnp.where(now, named, client)
        at = jnp.where(now, step, at).astype(jnp.int32)
        if mean:
            found = trees.add(metrics, found)
        return state, found, at, client

    state, metrics, at, client = train(first, end, one, (state, zeros, nowhere, client))
    if mean:
        metrics = jax.tree.map(lambda total: total / (end - first), metrics)
    at = jnp.where((at < 0) & ~trees.all_finite(state), end - 1, at)
    metrics[DIVERGED_STEP] = at.astype(jnp.int32)
    if client is not None:
        metrics[DIVERGED_CLIENT] = client
    return state, metrics
