"""Signs of life of other processes; with real ones: tests/faults/test_lost.py."""

import json

import pytest

from mosaic_jax.run import processes


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(processes.time, "monotonic", lambda: Clock.now)
    return Clock


def sign(name, beat):
    return json.dumps([name, beat])


def test_a_process_is_lost_once_its_sign_stays_the_same(clock):
    signs = processes._Signs(silent_seconds=20)
    for beat in range(3):
        assert signs._lost({"0": sign("a", beat), "1": sign("b", beat)}) == []
        clock.now += 9
    # The second one has stopped; the third comes late and is new.
    assert signs._lost({"0": sign("a", 3), "1": sign("b", 2), "2": sign("c", 0)}) == []
    clock.now += 9
    assert signs._lost({"0": sign("a", 3), "1": sign("b", 2), "2": sign("c", 0)}) == []
    clock.now += 2.5
    assert signs._lost({"0": sign("a", 4), "1": sign("b", 2), "2": sign("c", 0)}) == [
        "b"
    ]
    # A sign that had been delayed: it is there again.
    assert signs._lost({"1": sign("b", 3)}) == []


def test_one_that_was_stopped_itself_takes_nobody_for_lost(clock):
    signs = processes._Signs(silent_seconds=20)
    assert signs._lost({"1": sign("b", 0)}) == []
    for beat in (500, 500):  # the other has gone on meanwhile, or was stopped as well
        clock.now += 300
        assert signs._lost({"1": sign("b", beat)}) == []
    # It does not go on: looked at as often as ever, it is lost.
    for _ in range(3):
        clock.now += 8
        found = signs._lost({"1": sign("b", 500)})
    assert found == ["b"]
