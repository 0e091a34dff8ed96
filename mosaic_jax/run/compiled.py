"""The compiled programs of a loop, for one or more seeds."""

import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mosaic_jax.core import sharing, trees
from mosaic_jax.core.steps import Metrics, Steps
from mosaic_jax.core.types import Tree

_log = logging.getLogger(__name__)

# Of each seed.
Each = Sequence[Tree]


class Compiled:
    """A loop's programs; several seeds are batched.

    Unless it runs on the host, nothing is moved to or from the devices meanwhile.
    """

    def __init__(self, steps: Steps, place: Callable[[Tree], Tree]) -> None:
        """Nothing is compiled before it is called.

        Args:
          steps: the loop, of any of the seeds.
          place: puts arrays on the devices.
        """
        self._steps, self._place = steps, place
        work, measure = steps.work, steps.measure or (lambda args, state: {})

        def run(args: Each, states: Each, tallies: Each, first: Any, end: Any) -> Any:
            def one(args: Tree, state: Tree, tally: Tree) -> Any:
                return work.run(args, state, tally, first, end)

            return tuple(zip(*_each(one, args, states, tallies), strict=True))

        def measured(args: Each, states: Each) -> Sequence[Metrics]:
            # Whole on every device, so that each process can read them.
            return sharing.gather(_each(measure, args, states))

        if not work.on_host:
            # The programs' names in traces and in JAX's events of compilation.
            run.__name__ = steps.name
            measured.__name__ = f"{steps.name}_measure"
            run = jax.jit(run, donate_argnames="states")
            measured = jax.jit(measured)
        self._run, self._measured = run, measured

    def run(
        self, args: Each, states: Each, tallies: Each, first: int, end: int
    ) -> tuple[Each, Each, Sequence[Metrics]]:
        """Run the steps `first` to `end` - 1 of each seed, see `Work.run`.

        Args:
          args: of each seed.
          states: likewise; their memory is taken.
          tallies: likewise.
          first: number of the first step.
          end: number after the last step.
        """
        if self._steps.work.on_host:
            return self._run(args, states, tallies, first, end)
        window = self._place((np.int32(first), np.int32(end)))
        with jax.transfer_guard("disallow"):
            return self._run(args, states, tallies, *window)

    def measure(self, args: Each, states: Each) -> Sequence[Metrics]:
        """The further metrics of each seed at the end of a window."""
        if self._steps.measure is None:
            return [{}] * len(states)
        if self._steps.work.on_host:
            return self._measured(args, states)
        with jax.transfer_guard("disallow"):
            return self._measured(args, states)


def _each(function: Callable[..., Tree], *seeds: Each) -> Sequence[Tree]:
    """`function` of each seed's entry, batched where there are several."""
    count = len(seeds[0])
    if count == 1:
        return [function(*(each[0] for each in seeds))]
    found = jax.vmap(function)(*map(trees.stack, seeds))
    return [trees.take(found, i) for i in range(count)]


def traced(folder: pathlib.Path, program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`, recorded by JAX's profiler until its results are there."""

    def run(*args: Any) -> Any:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            result = jax.block_until_ready(program(*args))
        _log.info("profile in %s", folder)
        return result

    return run
