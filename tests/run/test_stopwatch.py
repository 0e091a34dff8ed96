"""Time is counted over all processes of a stage, and by what it was spent on."""

import time

import jax
import jax.numpy as jnp
import pytest

from mosaic_jax.core import files
from mosaic_jax.run import runner, stopwatch
from mosaic_jax.run.stopwatch import Stopwatch, TimeSheet
from tests import running, tiny

IDENTITY = {"stage": "init", "seed": 0}
FIELDS = {
    "method": "federated",
    "model__norm": "group",
    "init__rounds": 8,
    "warmup__rounds": 2,
    "evaluation__every": 2,
}


def test_kinds_sum_to_all_that_passed():
    start = time.monotonic()
    with Stopwatch() as watch:
        with Stopwatch.waits():
            time.sleep(0.05)
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7))
        time.sleep(0.05)
        spent = watch.spent()
    passed = time.monotonic() - start
    assert tuple(spent) == stopwatch.KINDS
    assert sum(spent.values()) == pytest.approx(passed, abs=0.02)
    assert spent["waiting"] == pytest.approx(0.05, abs=0.02)
    assert spent["computing"] >= 0.05
    assert spent["compiling"] > 0
    with Stopwatch.waits():
        time.sleep(0.01)
    assert watch.waiting == spent["waiting"], "counts after its end"


def test_a_sheet_goes_on_and_is_shared(tmp_path):
    path = tmp_path / "time.json"
    spent = {"computing": 10.0, "compiling": 2.0, "waiting": 1.0}
    files.write_json(path, {"identity": IDENTITY, "spent": spent})

    def sheet_of(watch, share, **changes):
        identity = IDENTITY | changes
        return TimeSheet(path, watch, identity=identity, share=share, writes=True)

    with Stopwatch() as watch:
        sheet = sheet_of(watch, 0.5)
        time.sleep(0.1)
        spent = sheet.spent()
        sheet.write()
        assert files.read_json(path)["spent"]["computing"] == 10.0, (
            "written at most once a second"
        )
        sheet.write(always=True)
    assert spent["compiling"] == 2.0 and spent["waiting"] == 1.0
    assert 10.05 <= spent["computing"] < 10.1
    assert files.read_json(path)["spent"]["computing"] >= spent["computing"]
    with Stopwatch() as watch:
        assert sum(sheet_of(watch, 1).spent().values()) > 13
        # Another stage's file counts for nothing, nor does one that is cut off.
        assert sum(sheet_of(watch, 1, seed=1).spent().values()) < 1
        path.write_text("cut off")
        assert sum(sheet_of(watch, 1).spent().values()) < 1


@pytest.mark.slow
def test_a_resumed_stage_counts_the_processes_before(tmp_path, monkeypatch):
    """Each process takes half a second longer than its work."""
    monkeypatch.setattr(stopwatch, "WRITE_EVERY", 0.0)
    start = runner.Experiment.start

    def slowly(self, *args):
        if args[0].name == "init":
            time.sleep(0.5)
        return start(self, *args)

    monkeypatch.setattr(runner.Experiment, "start", slowly)
    study = tiny.study(**FIELDS)
    for _ in range(2):
        running.stop_after(runner.Experiment(study, tmp_path), 1)
    summary = runner.Experiment(study, tmp_path).run()
    assert summary.seconds["init"] >= 1.5
    assert summary.seconds["warmup"] < summary.seconds["init"]
    for stage, kinds in summary.time.items():
        assert sum(kinds.values()) == pytest.approx(summary.seconds[stage])
        assert min(kinds.values()) >= 0
    assert not list(tmp_path.glob("stages/*/*/time.json"))
