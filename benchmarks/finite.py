"""What it costs to watch every round, client and parameter for values not finite.

    python -m benchmarks.finite

Three rounds of the digits demo's first stage with the checks of `run.loop` and
`stages.rounds`, and the same without, in turns; prints medians and their
ratio, and writes benchmarks/results/finite.json.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import timing
from mosaic_jax.cli import config_files, launch
from mosaic_jax.core import trees
from mosaic_jax.run import settings
from mosaic_jax.run.runner import Experiment

ROUNDS = 3


def rounds(work: Experiment) -> Callable[[], Any]:
    """A call that runs them from the start."""
    steps = work.start(work.study.chain[0], {}).send(None)
    compiled = jax.jit(steps.window).lower(steps.args, steps.state, 0, ROUNDS).compile()
    return lambda: jax.block_until_ready(compiled(steps.args, steps.state, 0, ROUNDS))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    launch.prepare()
    config = settings.from_mapping(config_files.load("digits_mosaic").to_dict())
    with tempfile.TemporaryDirectory() as folder:
        work = Experiment(config, pathlib.Path(folder))
        watched = rounds(work)
        with mock.patch.object(trees, "all_finite", lambda _: jnp.array(True)):
            unwatched = rounds(work)
        seconds = timing.take_turns(
            {"watched": watched, "not watched": unwatched}, args.repeats
        )
    found = {name: timing.spread(values) for name, values in seconds.items()}
    ratio = found["watched"]["median"] / found["not watched"]["median"]
    rows = [
        [name, f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})"]
        for name, one in found.items()
    ]
    print(timing.table(["rounds", "seconds"], rows))
    print(f"ratio {ratio:.3f}")
    timing.save("finite", {"seconds": found, "ratio": ratio})


if __name__ == "__main__":
    main()
