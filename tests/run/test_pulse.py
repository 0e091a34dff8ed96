"""A run is never silent for long."""

import logging
import time

from mosaic_jax.run import pulse

SILENCE = 0.08


def said(caplog):
    return [r.message for r in caplog.records if r.name == pulse.__name__]


def test_silence_is_broken(caplog):
    caplog.set_level(logging.INFO, "mosaic_jax")
    start = time.monotonic() - 7
    with pulse.Pulse(lambda: ("init: compiling", start), SILENCE):
        time.sleep(8 * SILENCE)
    count = len(said(caplog))
    assert count >= 2
    assert said(caplog)[0] in ("init: compiling, 7 s", "init: compiling, 8 s")
    time.sleep(3 * SILENCE)
    assert len(said(caplog)) == count


def test_who_speaks_is_not_interrupted(caplog):
    caplog.set_level(logging.INFO, "mosaic_jax")
    with pulse.Pulse(lambda: ("init", time.monotonic()), 4 * SILENCE):
        for _ in range(40):
            logging.getLogger("mosaic_jax.any").info("a line")
            time.sleep(SILENCE / 4)
    assert said(caplog) == []


def test_many_lines_of_one_logger_are_thinned_out():
    sparse = pulse.Sparse("a", most=3)

    def shown(name, at):
        record = logging.makeLogRecord({"name": name})
        record.created = at
        return sparse.filter(record)

    assert [shown("a", 10 + i / 10) for i in range(5)] == [True] * 3 + [False] * 2
    assert shown("b", 10.5)
    assert [shown("a", 11.05 + i / 100) for i in range(2)] == [True, False]
