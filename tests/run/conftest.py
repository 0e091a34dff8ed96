"""What tests of loops share."""

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax.run import tracking
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.running import Loop
from mosaic_jax.run.stopwatch import Stopwatch, TimeSheet


@pytest.fixture
def loop_of():
    """`loop_of(folder)`: the loop of a stage "count" of one seed, in its own folder."""
    with Stopwatch() as watch:

        def make(folder, *, seed=0, interruption=None, grace=10.0):
            folder.mkdir(parents=True, exist_ok=True)
            identity = {"stage": "count", "seed": seed}
            return Loop(
                stage="count",
                seed=seed,
                directory=folder / "checkpoints",
                tracker=tracking.Tracker(folder, settings={}),
                progress=tracking.Progress([folder], {"count": 1.0}, writes=True),
                interruption=interruption or Interruption(),
                checkpoint_seconds=0.0,
                grace_seconds=grace,
                place=lambda tree: jax.tree.map(jnp.asarray, tree),
                identity=identity,
                time_sheet=TimeSheet(
                    folder / "time.json",
                    watch,
                    identity=identity,
                    share=1,
                    writes=True,
                ),
            )

        yield make
