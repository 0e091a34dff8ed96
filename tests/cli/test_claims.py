"""Processes that share the cells of a sweep; a lock of this process counts as one's."""

import signal
import subprocess
import sys
import time

from mosaic_jax.cli.claims import Claims

NEEDS = {"a": {"init", "a1"}, "b": {"init", "b1"}, "c": {"c0", "c1"}}


def test_each_takes_what_nobody_works_on(tmp_path):
    first, second, third = (Claims(tmp_path) for _ in range(3))
    with first.take(NEEDS) as one:
        assert one == "a"
        # "b" needs a stage that "a" computes now.
        with second.take(NEEDS) as other:
            assert other == "c"
            with third.take(NEEDS) as last:
                assert last is None
        finished = NEEDS | {"a": {"a1"}, "b": {"b1"}}
        with second.take(finished) as other:
            assert other == "b"
    with second.take(NEEDS) as one:
        assert one == "a"


def test_what_is_settled_is_told_to_those_who_work_now(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    first.settle("a")
    first.settle("b", "diverged")
    assert second.settled("a") and second.settled("b") and not second.settled("c")
    assert (second.failure("a"), second.failure("b")) == ("", "diverged")
    time.sleep(0.01)
    # A later command tries again.
    assert not Claims(tmp_path).settled("b")


def test_a_process_that_dies_gives_its_claim_back(tmp_path):
    code = f"""
from mosaic_jax.cli.claims import Claims
import pathlib, time
with Claims(pathlib.Path({str(tmp_path)!r})).take({NEEDS!r}) as name:
    print(name, flush=True)
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"a\n"
    mine = Claims(tmp_path)
    with mine.take({"a": set()}) as name:
        assert name is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with mine.take({"a": set()}) as name:
        assert name == "a"
