"""How a process of several leaves the others, by a store that this test keeps."""

import jax
import pytest

from mosaic_jax.run import peers, processes


class Ended(Exception):
    pass


class Store(dict):
    def key_value_set(self, key, value):
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.items() if key.startswith(folder)]


@pytest.fixture
def leave(monkeypatch):
    """Process `number` of four leaves; returns the seconds that it waited."""
    store, clock = Store(), [0.0]

    def end(code):
        raise Ended

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(peers, "store", lambda: store)
    monkeypatch.setattr(peers, "count", lambda: 4)
    monkeypatch.setattr(peers, "end", end)
    monkeypatch.setattr(peers, "_begin_to_leave", lambda message, code: None)
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(peers.time, "sleep", sleep)

    def leave(number, **how):
        monkeypatch.setattr(peers, "index", lambda: number)
        begin = clock[0]
        with pytest.raises(Ended):
            peers.leave("", 2, **how)
        return clock[0] - begin

    return leave


def test_the_first_waits_for_all_that_are_there(leave):
    assert leave(2, tell="gave up") == 0
    # Two are there still, perhaps.
    assert leave(0) > peers.LAST_TO_LEAVE
    for number in (1, 3):
        leave(number)
    assert leave(0) < 1


def test_the_first_does_not_wait_for_one_that_another_misses(leave):
    """Which may tell it to leave before it misses that one itself."""
    for number in (1, 2):
        leave(number, tell="process 3 is silent", lost=1)
    assert leave(0) < 1


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: all-reduce failed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed"), True),
        (ValueError("Unknown name"), False),
        (KeyError("GLOO: x"), False),
    ],
)
def test_what_a_lost_process_breaks_is_not_told_before_its_name(
    error, waits, monkeypatch
):
    """Those who watch for signs of life know better than an error of the runtime."""
    waited = []

    class Signs:
        def wait_for_lost(self):
            waited.append(True)

    def leave(*_, **__):
        raise Ended

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "_signs", Signs())
    monkeypatch.setattr(peers, "leave", leave)
    with pytest.raises(Ended), processes.fail_together():
        raise error
    assert bool(waited) == waits
