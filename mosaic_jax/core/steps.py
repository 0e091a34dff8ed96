"""Loops of pure training steps, which a stage yields to whoever runs the stage."""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import sharing, trees
from mosaic_jax.core.types import Array, Struct, Tree

# Scalars by name.
Metrics = dict[str, Any]
# (args, state, number of the step) -> (state, metrics of the step)
Step = Callable[[Tree, Tree, Any], tuple[Tree, Metrics]]
# A stage in progress: yields `Steps`, is sent their final states, returns its outcome.
Run = Generator["Steps", Tree, Any]

# Name of the loops whose steps are federated rounds.
ROUND = "round"

# Scope of the loops over training steps: what is told of a program, traced or compiled,
# names them by it.
TRAINING = "training"

# Metrics of a window that are not plotted: where training stopped being finite.
DIVERGED_STEP, DIVERGED_CLIENT = "diverged_step", "diverged_client"


class Work:
    """What a loop computes, in windows of steps whose metrics are recorded.

    A window may be run in any number of parts, to the same bits: what its metrics are
    made of, its tally, goes from part to part.

    Attributes:
      on_host: whether `run` is not compiled as a whole but calls compiled functions;
        NumPy leaves of the state stay in host memory.
    """

    on_host: ClassVar[bool] = False

    def empty(self, args: Tree, state: Tree) -> Tree:
        """The tally before the first step of a window, in host memory.

        Args:
          args: of the loop, read for their shapes alone.
          state: likewise.
        """
        raise NotImplementedError

    def run(
        self, args: Tree, state: Tree, tally: Tree, first: Any, end: Any
    ) -> tuple[Tree, Tree, Metrics]:
        """Run the steps of a part of a window; a pure function.

        Args:
          args: arrays that all steps read.
          state: before step `first`.
          tally: of the steps of the window before it.
          first: [] int32, number of the first step.
          end: [] int32, number after the last step; > `first`.

        Returns:
          State and tally after the last step, and the metrics of the window so far.
          Among them may be `DIVERGED_STEP`, [] int32: the first step with metrics that
          are not finite, else the last where the state is not, else -1; and
          `DIVERGED_CLIENT`, [] int32: a client with which that began, else -1.
        """
        raise NotImplementedError


class Tally(Struct):
    """What the metrics of a window are made of.

    Attributes:
      metrics: sums over the steps, or those of the last one.
      count: [] int32, number of steps.
      at: [] int32, number of the first step that was not finite; -1: none.
      client: [] int32, number of the client that this step named; -1: none.
    """

    metrics: Metrics
    count: Array
    at: Array
    client: Array


@dataclasses.dataclass(frozen=True)
class Repeated(Work):
    """Steps that are all the same computation.

    Attributes:
      step: a pure function. Whatever differs between seeds comes in its `args`: arrays
        closed over are constants of the program. A step is not finite if a metric is
        not, or `DIVERGED_CLIENT`, which it may report, is not -1.
      mean: whether metrics are averaged over a window; otherwise they are those of its
        last step.
    """

    step: Step
    mean: bool = True

    @functools.cached_property
    def _step(self) -> Step:
        return traced_once(self.step)

    def empty(self, args: Tree, state: Tree) -> Tally:
        """See `Work`."""
        shapes = dict(jax.eval_shape(self._step, args, state, np.int32(0))[1])
        shapes.pop(DIVERGED_CLIENT, None)
        zeros = {name: np.zeros(one.shape, one.dtype) for name, one in shapes.items()}
        nothing, nowhere = np.zeros((), np.int32), np.full((), -1, np.int32)
        return Tally(metrics=zeros, count=nothing, at=nowhere, client=nowhere)

    def run(
        self, args: Tree, state: Tree, tally: Tally, first: Array, end: Array
    ) -> tuple[Tree, Tally, Metrics]:
        """See `Work`."""

        def one(number: Array, carry: tuple[Tree, Tally]) -> tuple[Tree, Tally]:
            state, tally = carry
            # Whole on every device, as the state is before the step.
            state, found = sharing.gather(self._step(args, state, number))
            metrics = dict(found)
            client = metrics.pop(DIVERGED_CLIENT, jnp.int32(-1))
            bad = ~trees.all_finite(metrics) | (client >= 0)
            now = bad & (tally.at < 0)
            return state, Tally(
                metrics=trees.add(tally.metrics, metrics) if self.mean else metrics,
                count=tally.count + 1,
                at=jnp.where(now, number, tally.at).astype(jnp.int32),
                client=jnp.where(now, client, tally.client).astype(jnp.int32),
            )

        state, tally = train(first, end, one, (state, tally))
        metrics = dict(tally.metrics)
        if self.mean:
            metrics = {name: total / tally.count for name, total in metrics.items()}
        at = jnp.where((tally.at < 0) & ~trees.all_finite(state), end - 1, tally.at)
        metrics |= {
            DIVERGED_STEP: at.astype(jnp.int32),
            DIVERGED_CLIENT: tally.client,
        }
        return state, tally, metrics


@dataclasses.dataclass(frozen=True)
class OnHost(Work):
    """Steps that run on the host and call compiled functions.

    The metrics of a window are those of its last step.

    Attributes:
      step: see `Repeated`; not traced, and may write to NumPy leaves of its state.
    """

    step: Step
    on_host: ClassVar[bool] = True

    def empty(self, args: Tree, state: Tree) -> Tree:
        """See `Work`; nothing, as metrics are of the last step."""
        del args, state
        return ()

    def run(
        self, args: Tree, state: Tree, tally: Tree, first: int, end: int
    ) -> tuple[Tree, Tree, Metrics]:
        """See `Work`; ends after a step that is not finite."""
        metrics: Metrics = {}
        for number in range(first, end):
            state, metrics = self.step(args, state, number)
            finite = all(np.isfinite(value).all() for value in metrics.values())
            if not finite or metrics.get(DIVERGED_CLIENT, -1) >= 0:
                return state, tally, {**metrics, DIVERGED_STEP: np.int32(number)}
        return state, tally, metrics


@dataclasses.dataclass
class Ended:
    """Where a loop ended before its last step: after `step` steps; None: it did not."""

    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """A loop that a stage asks for: `state = yield Steps(...)`.

    Attributes:
      name: of the loop, unique within its stage.
      work: what its steps compute.
      args: arrays that all steps read.
      state: before step 0.
      num_steps: of the whole loop.
      every: steps in a window, after which metrics are recorded; windows end at
        multiples of it, and with the loop.
      samples_per_step: training samples, for the rate in the progress bar.
      measure: from `args` and the state at the end of a window to further metrics of
        it; a pure function, compiled unless the work is on the host. None: there are
        none.
      together: whether the loop may be batched over seeds.
      layout: digest of what a step's number means, where that depends on how the work
        is laid out; a state that was saved under another layout is of no use.
      pictures: from a state to uint8 images [rows, n, H, W, D] by name, for those who
        watch; None: there are none.
      ended: set by whoever runs the loop, if it ended early.
    """

    name: str
    work: Work
    args: Tree
    state: Tree
    num_steps: int
    every: int
    samples_per_step: int
    measure: Callable[[Tree, Tree], Metrics] | None = None
    together: bool = True
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

    def window_end(self, step: int) -> int:
        """Number after the last step of the window that `step` is in."""
        return min((step // self.every + 1) * self.every, self.num_steps)

    def window(
        self, args: Tree, state: Tree, first: Any, end: Any
    ) -> tuple[Tree, Metrics]:
        """State and metrics after a whole window: for those who run one in one piece.

        Args:
          args: see `Work.run`.
          state: likewise.
          first: likewise.
          end: likewise.
        """
        tally = self.work.empty(args, state)
        state, _, metrics = self.work.run(args, state, tally, first, end)
        return state, metrics | (self.measure(args, state) if self.measure else {})


def traced_once(step: Callable[..., Tree]) -> Callable[..., Tree]:
    """`step`, which is traced once for the shapes of its metrics and for its loop.

    It is no program of its own: what it is called in contains it.
    """
    return jax.jit(step, inline=True)


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
