"""Processes of one study that are killed or stopped: the others end, and say why."""

import json
import signal
import time

import numpy as np
import pytest

from mosaic_jax.run import checkpoint
from tests import several

SILENT = 8


def progress(workdir):
    path = workdir / "progress.json"
    return json.loads(path.read_text()).get("step", 0) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_the_others_end_soon(tmp_path, number, name):
    fields = [
        f"--config.compute.silent_seconds={SILENT}",
        "--config.init.rounds=100000",
    ]
    found = several.launch([tmp_path] * 2, [fields] * 2)
    lost, other = found[number], found[1 - number]
    try:
        latest = time.monotonic() + 300
        while not progress(tmp_path):
            assert time.monotonic() < latest
            assert all(process.poll() is None for process in found)
            time.sleep(0.5)
        begin = time.monotonic()
        lost.send_signal(getattr(signal, name))
        output, _ = other.communicate(timeout=120)
        assert time.monotonic() - begin < SILENT + 15
        assert other.returncode not in (0, None)
        *_, told = [line for line in output.splitlines() if line.startswith("error: ")]
        if number == 1:
            assert told.startswith("error: process 1 on ")
            assert f"has sent no sign of life for {SILENT} s" in told
        elif name == "SIGSTOP":
            assert "process 0, which keeps the processes together, has not" in told
        else:
            assert "is gone, which keeps them together" in told
        assert told.endswith("the same command resumes")
        lost.send_signal(signal.SIGCONT)
        output, _ = lost.communicate(timeout=120)
        assert lost.returncode not in (0, None)
        if name == "SIGKILL":
            assert "ended: it was killed, out of memory perhaps" in output
    finally:
        for process in found:
            process.kill()


ROUNDS = "--config.init.rounds=40"
FIELDS = [f"--config.compute.silent_seconds={SILENT}", ROUNDS]


def parameters(workdir):
    """Of the global model that a study ends with, by path."""
    (folder,) = workdir.glob("stages/init/*/artifacts")
    saved = checkpoint.Checkpoints(folder)
    arrays = saved.latest()[1]
    saved.close()
    return {p: np.asarray(x) for p, x in arrays.items() if p.startswith("global_model")}


def kill_one(workdir, number):
    """Kill one of two processes in the middle of the rounds; the other ends by it."""
    found = several.launch([workdir] * 2, [FIELDS] * 2)
    try:
        while progress(workdir) < 5:
            assert all(process.poll() is None for process in found)
            time.sleep(0.05)
        found[number].kill()
        for process in found:
            process.communicate(timeout=200)
        assert all(process.returncode for process in found)
    finally:
        for process in found:
            process.kill()


@pytest.mark.slow
def test_a_killed_study_goes_on_with_two_processes_or_one(tmp_path):
    codes, output = several.start([tmp_path / "whole"] * 2, [[ROUNDS]] * 2)
    assert codes == [0, 0], output
    expected = parameters(tmp_path / "whole")
    for number, after in [(1, 2), (0, 1)]:
        workdir = tmp_path / str(after)
        kill_one(workdir, number)
        codes, output = several.start([workdir] * after, [[ROUNDS]] * after, after)
        assert codes == [0] * after, output
        assert "resuming at step" in output[0]
        found = parameters(workdir)
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            # On the same number of processes, to the bit.
            within = 0 if after == 2 else 1e-3
            np.testing.assert_allclose(found[path], leaf, rtol=0, atol=within)
