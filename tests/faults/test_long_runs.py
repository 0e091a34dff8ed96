"""Memory and open files of a run do not grow with its rounds."""

import os

import jax
import numpy as np
import pytest

from mosaic_jax.run import environment, runner, tracking
from tests import tiny

FIRST, LAST = 30, 300


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"compute__client_state": "host"}, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_three_hundred_rounds_take_no_more_than_thirty(tmp_path, monkeypatch, changes):
    found = {}
    record = tracking.Tracker.record

    def sampled(self, stage, loop, step, *args):
        record(self, stage, loop, step, *args)
        if step in (FIRST, LAST):
            found[step] = {
                "host": environment.memory_in_use(),
                "arrays": sum(array.nbytes for array in jax.live_arrays()),
                "files": len(os.listdir("/proc/self/fd")),
            }

    monkeypatch.setattr(tracking.Tracker, "record", sampled)
    study = tiny.study(
        method="federated",
        init__method="fedbn",
        init__rounds=LAST,
        warmup__rounds=0,
        evaluation__every=10,
        **changes,
    )
    runner.Experiment(study, tmp_path).run()
    first, last = found[FIRST], found[LAST]
    assert last["arrays"] == first["arrays"]
    assert last["files"] == first["files"]
    assert last["host"] < 1.02 * first["host"]
    assert np.isfinite(last["host"])
