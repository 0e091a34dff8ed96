"""A full disk, a read-only one, two runs in one place."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mosaic_jax.core import files
from mosaic_jax.run import checkpoint
from tests.launched import run, start

# A study without GANs and students.
SHORT = ("--config.method=federated", "--config.warmup.rounds=4")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; `resize("size=2m")` changes it."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options, *more):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, *more, "tmpfs", str(path)],
            capture_output=True,
        )

    if sys.platform != "linux" or os.geteuid() or mount("size=64m").returncode:
        pytest.skip("needs to mount a file system")
    yield path, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", str(path)], check=True)


def one_error(done):
    """The one line on stderr that is no log line."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_goes_on_later(small_disk, tmp_path):
    disk, resize = small_disk
    whole = run(tmp_path / "whole", *SHORT)
    assert whole.returncode == 0, whole.stderr
    workdir = disk / "run"
    # Room for some stages only.
    resize("size=300k")
    done = run(workdir, *SHORT)
    assert done.returncode == 2, done.stderr
    assert "no space left" in one_error(done)
    finished = list(workdir.glob("stages/*/*/done.json"))
    for path in finished:
        files.read_json(path)
        folder = checkpoint.Checkpoints(path.parent / "artifacts")
        assert folder.latest() is not None
        folder.close()
    resize("size=64m")
    done = run(workdir, *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused from") == len(finished)
    found = [
        files.read_json(path / "summary.json") for path in (workdir, tmp_path / "whole")
    ]
    assert found[0]["test_accuracy"] == found[1]["test_accuracy"]
    assert found[0]["stages"] == found[1]["stages"]


def test_a_read_only_disk_is_one_line(small_disk):
    disk, resize = small_disk
    resize("ro")
    done = run(disk / "run")
    assert done.returncode == 2, done.stderr
    assert "Read-only file system" in one_error(done)


def started(workdir):
    process = start(workdir, "--config.init.rounds=100000")
    for line in process.stderr:
        if " init round " in line:
            return process
    raise AssertionError("it ended early")


@pytest.mark.slow
def test_two_runs_in_one_place_and_a_lock_that_a_dead_one_left(tmp_path):
    first = started(tmp_path)
    second = run(tmp_path, "--config.init.rounds=100000")
    assert second.returncode == 2
    assert f"in use by process {first.pid} on " in one_error(second)
    assert first.poll() is None
    kill(first)
    assert (tmp_path / ".lock").read_text().startswith(f"{first.pid} on ")
    # The dead one's lock is free.
    kill(started(tmp_path))


def kill(process):
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_harms_nothing(tmp_path, signum, code):
    process = started(tmp_path)
    begin = time.monotonic()
    process.send_signal(signum)
    process.send_signal(signum)
    process.wait(timeout=60)
    process.stderr.close()
    assert time.monotonic() - begin < 5
    assert process.returncode in (-signum, code)
    assert files.read_json(tmp_path / "config.json")
    kill(started(tmp_path))


@pytest.mark.slow
def test_the_signal_is_followed_within_seconds(tmp_path):
    process = started(tmp_path)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    process.stderr.close()
    assert time.monotonic() - begin < 5
    assert process.returncode == 143
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["state"] == "interrupted"
    assert list(tmp_path.glob("stages/init/*/checkpoints/round/[0-9]*"))
