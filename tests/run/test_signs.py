"""Signs of life of other processes; with real ones: tests/faults/test_lost.py."""

import json
import threading

import pytest

from mosaic_jax.run import signs
from mosaic_jax.run.signs import Signs


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(signs.time, "monotonic", lambda: Clock.now)
    return Clock


def store(*beats):
    """Signs as the store has them; None: the process has sent none yet."""
    return {
        f"mosaic_jax/alive/{i}": json.dumps([f"process {i} on host", beat])
        for i, beat in enumerate(beats)
        if beat is not None
    }


def test_a_process_is_lost_once_its_sign_stays_the_same(clock):
    seen = Signs(silent_seconds=20, num_processes=2)
    for beat in range(3):
        assert seen.lost(store(beat, beat)) == []
        clock.now += 9
    for beat in (3, 4):  # the second one has stopped
        assert seen.lost(store(beat, 2)) == []
        clock.now += 1
    clock.now += 7
    assert seen.lost(store(5, 2)) == []
    clock.now += 3
    assert seen.lost(store(6, 2)) == ["process 1 on host"]
    # A sign that had been delayed: it is there again.
    assert seen.lost(store(7, 3)) == []


def test_so_is_one_that_never_sent_any(clock):
    seen = Signs(silent_seconds=20, num_processes=2)
    for beat in range(3):
        clock.now += 7
        found = seen.lost(store(beat, None))
    assert found == ["process 1"]


def test_one_that_was_stopped_itself_takes_nobody_for_lost(clock):
    seen = Signs(silent_seconds=20, num_processes=1)
    assert seen.lost(store(0)) == []
    for beat in (500, 500):  # the other has gone on meanwhile, or was stopped as well
        clock.now += 300
        assert seen.lost(store(beat)) == []
    # It does not go on: looked at as often as ever, it is lost.
    for _ in range(3):
        clock.now += 8
        found = seen.lost(store(500))
    assert found == ["process 0 on host"]


def test_a_process_that_is_through_waits_for_the_others(monkeypatch):
    """And its threads have ended, inside the store they would make Python abort."""
    kept = {}

    class Store:
        def key_value_set(self, key, value, **_):
            kept[key] = value

        def key_value_dir_get(self, folder):
            return [(key, kept[key]) for key in list(kept) if key.startswith(folder)]

    registered = []
    monkeypatch.setattr(signs, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(signs.atexit, "register", registered.append)
    monkeypatch.setattr(signs.peers, "store", Store)
    monkeypatch.setattr(signs.peers, "index", lambda: 0)
    before = set(threading.enumerate())
    Signs(silent_seconds=20, num_processes=2).start()
    ours = set(threading.enumerate()) - before
    (end,) = registered
    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.3)
    assert ending.is_alive() and all(thread.is_alive() for thread in ours)
    kept["mosaic_jax/through/1"] = ""
    ending.join(5)
    assert not ending.is_alive()
    assert len(ours) == 2 and not any(thread.is_alive() for thread in ours)
