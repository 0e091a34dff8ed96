"""The demo killed at random moments of every stage, and in the middle of writing."""

import contextlib
import dataclasses
import re
import signal
import threading
import time

import numpy as np
import pytest

from mosaic_jax.core import files, trees
from mosaic_jax.run import checkpoint
from tests import launched

DEMO = "configs/digits_mosaic.py"
# Each run is killed once in each stage; there are as many runs as it takes.
KILLS = 50
RUNNING = re.compile(r" ([\w@]+): running$")
DONE = re.compile(r" ([\w@]+): done in ([\d.]+) s$")
STEP = re.compile(r"^\S+ ([\w@]+) (\w+) (\d+)  ")
RESUMED = re.compile(r" ([\w@]+) (\w+): resuming at step (\d+)$")
# Names under which a file or folder is until it is whole.
PARTIAL = ("*.partial", "**/*.orbax-checkpoint-tmp*")


@dataclasses.dataclass
class Start:
    """A start of the demo: its process and what it has logged."""

    workdir: object
    options: tuple

    def __enter__(self):
        environment = launched.environment()
        # As users run it: optimised, on one device.
        environment.pop("XLA_FLAGS", None)
        self.process = launched.start(
            self.workdir, *self.options, config=DEMO, env=environment
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def __exit__(self, *_):
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()

    def found(self, pattern):
        """The groups of every log line that matches."""
        lines = [pattern.search(line) for line in list(self.lines)]
        return [match.groups() for match in lines if match]

    def wait_for(self, condition):
        while not condition() and self.process.poll() is None:
            time.sleep(0.001)


def kill(start, stage, seconds, writing):
    """In `stage`: once it has run for `seconds`, or writes; returns whether it did."""
    start.wait_for(lambda: (stage,) in start.found(RUNNING))
    if writing:
        folder = start.workdir / "stages" / stage

        def due():
            with contextlib.suppress(FileNotFoundError):
                return any(any(folder.glob(f"*/{name}")) for name in PARTIAL)
    else:
        at = time.monotonic() + seconds

        def due():
            return time.monotonic() >= at

    start.wait_for(due)
    start.process.send_signal(signal.SIGKILL)
    return bool(due())


def results(workdir):
    """The digest of every stage's artifacts, and all accuracies."""
    digests = {}
    for path in sorted(workdir.glob("stages/*/*/artifacts")):
        saved = checkpoint.Checkpoints(path)
        digests[path.parts[-3]] = trees.digest(saved.latest()[1])
        saved.close()
    summary = files.read_json(workdir / "summary.json")
    return digests, {
        name: value for name, value in summary.items() if name.endswith("_accuracy")
    }


def repeated(before, after):
    """Steps of each loop that were logged before a kill and run again after it."""
    reached = {(stage, loop): int(step) for stage, loop, step in before}
    resumed = {(stage, loop): int(step) for stage, loop, step in after.found(RESUMED)}
    again = {found[:2] for found in after.found(STEP)} | resumed.keys()
    return {
        name: reached[name] - resumed.get(name, 0) for name in again & reached.keys()
    }


@pytest.mark.slow
def test_the_demo_survives_fifty_kills(tmp_path, capsys):
    np_rng = np.random.RandomState(0)
    with Start(tmp_path / "whole", ()) as whole:
        pass
    assert whole.process.returncode == 0, whole.lines
    expected = results(tmp_path / "whole")
    seconds = {stage: float(time) for stage, time in whole.found(DONE)}
    kills, resumes, in_writing, most, run = [], 0, 0, {}, 0
    while len(kills) < KILLS:
        workdir, before = tmp_path / f"run{run}", []
        # Every chunk is saved, or only what is finished.
        options = (f"--config.log.checkpoint_seconds={60 * (run % 2)}",)
        for stage in [*seconds, ""]:
            writing, hit = np_rng.rand() < 0.4, False
            with Start(workdir, options) as start:
                if stage:
                    moment = 0.9 * np_rng.rand() * seconds[stage]
                    hit = kill(start, stage, moment, writing)
            assert not any("Traceback" in line for line in start.lines), start.lines
            for name, count in repeated(before, start).items():
                most[name] = max(most.get(name, 0), count)
            resumes += bool(before)
            before = start.found(STEP)
            # Where it was faster than the one undisturbed, it ended in peace.
            if start.process.returncode == -signal.SIGKILL:
                kills.append((run, stage))
                in_writing += writing and hit
            else:
                assert start.process.returncode == 0, start.lines
        assert results(workdir) == expected, kills
        run += 1
    assert {stage for _, stage in kills} == seconds.keys()
    with capsys.disabled():
        print(f"\n{len(kills)} kills, {in_writing} of them while a file was written;")
        print(f"{resumes} resumes; {run} runs with equal parameters and accuracies;")
        print("steps repeated at most:")
        for (stage, loop), count in sorted(most.items()):
            print(f"  {stage} {loop} {count}")
