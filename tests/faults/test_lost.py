"""Processes of one study that are killed or stopped: the others end, and say why."""

import json
import signal
import time

import pytest

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
