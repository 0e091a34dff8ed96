"""Loops of a stage: resumed, batched over seeds, stopped; on steps that only count."""

import dataclasses
import logging
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, files
from mosaic_jax.core.steps import OnHost, Repeated, Steps
from mosaic_jax.run import checkpoint, store
from mosaic_jax.run import loop as loop_module
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.loop import run_stage
from tests import running

NUM_STEPS, EVERY = 7, 2


def counting(start, *, on_trace=lambda number: None, **changes):
    """A stage of one loop; it hands on the loop's last state."""

    def step(args, state, number):
        on_trace(number)
        return state * 0.5 + number + args, {"loss": state}

    steps = Steps(
        name="add",
        work=Repeated(step),
        args=jnp.zeros(()),
        state=jnp.asarray(start, jnp.float32),
        num_steps=NUM_STEPS,
        every=EVERY,
        samples_per_step=1,
    )
    state = yield dataclasses.replace(steps, **changes)
    return float(state)


def expected(start):
    for step in range(NUM_STEPS):
        start = start * 0.5 + step
    return start


def recorded(loop):
    return [row["step"] for row in loop.tracker.history("count", "add")]


def stopped(loop_of, folder, monkeypatch, **changes):
    """A loop that was killed after its second window, at step 4."""
    with monkeypatch.context() as patch:
        running.kill_at(patch, 4)
        with pytest.raises(running.Killed):
            run_stage([loop_of(folder)], [counting(3.0, **changes)])


def test_a_loop_runs_to_its_last_step_in_chunks(loop_of, tmp_path):
    loop = loop_of(tmp_path)
    assert run_stage([loop], [counting(3.0)]) == [expected(3.0)]
    assert recorded(loop) == [2, 4, 6, 7]


def test_it_goes_on_from_its_checkpoint(loop_of, tmp_path, monkeypatch, caplog):
    stopped(loop_of, tmp_path, monkeypatch)
    loop = loop_of(tmp_path)
    with caplog.at_level(logging.INFO, "mosaic_jax"):
        assert run_stage([loop], [counting(3.0)]) == [expected(3.0)]
    assert "count add: resuming at step 4" in caplog.text
    assert recorded(loop) == [2, 4, 6, 7]


def test_it_does_not_in_another_layout(loop_of, tmp_path, monkeypatch, caplog):
    stopped(loop_of, tmp_path, monkeypatch, layout="a")
    loop = loop_of(tmp_path)
    with caplog.at_level(logging.INFO, "mosaic_jax"):
        assert run_stage([loop], [counting(3.0, layout="b")]) == [expected(3.0)]
    assert "step 4 was saved under another layout of the work" in caplog.text
    assert "resuming" not in caplog.text
    assert recorded(loop) == [2, 4, 6, 7]


def test_nor_for_another_identity(loop_of, tmp_path, monkeypatch, caplog):
    stopped(loop_of, tmp_path, monkeypatch)
    loop = loop_of(tmp_path, seed=1)
    with caplog.at_level(logging.INFO, "mosaic_jax"):
        assert run_stage([loop], [counting(3.0)]) == [expected(3.0)]
    assert "belongs to another study: its seed is" in caplog.text
    assert "resuming" not in caplog.text


def test_loops_that_are_alike_run_as_one_program(loop_of, tmp_path, monkeypatch):
    traced = []
    loops = [loop_of(tmp_path / str(seed), seed=seed) for seed in range(3)]

    def runs():
        return [counting(float(seed), on_trace=traced.append) for seed in range(3)]

    assert run_stage(loops, runs()) == [expected(0.0), expected(1.0), expected(2.0)]
    # Three stages of functions of their own: one is traced, for all of them.
    assert len(traced) == 1
    assert [recorded(loop) for loop in loops] == [[2, 4, 6, 7]] * 3


@pytest.mark.parametrize(
    "other", [{"together": False}, {"state": jnp.zeros(3)}, {"every": 3}]
)
def test_loops_that_are_not_run_apart(loop_of, tmp_path, other):
    loops = [loop_of(tmp_path / str(seed), seed=seed) for seed in range(2)]
    traced = []

    def stage(changes):
        def step(args, state, number):
            traced.append(1)
            return state + 1, {}

        state = yield Steps(
            **{
                "name": "add",
                "work": Repeated(step),
                "args": (),
                "state": jnp.zeros(()),
                "num_steps": NUM_STEPS,
                "every": EVERY,
                "samples_per_step": 1,
            }
            | changes
        )
        return np.unique(state).tolist()

    same = {"together": False} if "together" in other else {}
    assert run_stage(loops, [stage(same), stage(other)]) == [[NUM_STEPS]] * 2
    assert len(traced) == 2


def test_a_loop_on_the_host_keeps_its_arrays_there(loop_of, tmp_path):
    kinds = []

    def stage():
        def step(args, state, number):
            kinds.append(type(state))
            state += 1
            return state, {"loss": 0.0}

        state = yield Steps(
            "add",
            OnHost(step),
            (),
            np.zeros(2),
            NUM_STEPS,
            every=EVERY,
            samples_per_step=1,
        )
        return state.tolist()

    assert run_stage([loop_of(tmp_path)], [stage()]) == [[NUM_STEPS] * 2]
    assert set(kinds) == {np.ndarray}


def test_what_is_not_finite_is_named_and_not_saved(loop_of, tmp_path):
    def stage():
        def step(args, state, number):
            state = state + jnp.where(number == 4, jnp.inf, 1.0)
            return state, {"loss": state}

        yield Steps(
            "add",
            Repeated(step),
            (),
            jnp.zeros(()),
            NUM_STEPS,
            every=EVERY,
            samples_per_step=1,
        )

    with pytest.raises(errors.DivergedError, match="seed 3, count, in add 5: loss is"):
        run_stage([loop_of(tmp_path, seed=3)], [stage()])
    saved = checkpoint.Checkpoints(
        tmp_path / "checkpoints" / "add", {"stage": "count", "seed": 3, "loop": "add"}
    )
    assert saved.latest()[0] == 4


def test_a_signal_saves_the_state_and_stops(loop_of, tmp_path, caplog):
    with Interruption() as interruption:
        loop = loop_of(tmp_path, interruption=interruption)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(errors.Interrupted) as stop:
            run_stage([loop], [counting(3.0)])
    assert stop.value.signum == signal.SIGTERM
    with caplog.at_level(logging.INFO, "mosaic_jax"):
        assert run_stage([loop_of(tmp_path)], [counting(3.0)]) == [expected(3.0)]
    assert "resuming at step 1" in caplog.text


def test_who_watches_sees_the_state(loop_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "SHOW_EVERY", 0.0)
    seen = []

    def pictures(state):
        seen.append(float(state))
        return {"now": np.full((1, 1, 2, 2, 1), len(seen), np.uint8)}

    loop = loop_of(tmp_path)
    assert run_stage([loop], [counting(3.0, pictures=pictures)]) == [expected(3.0)]
    assert len(seen) == 5 and seen[0] == 3.0  # before each call
    found = files.read_arrays(loop.directory / store.PICTURES)
    assert found["now"].max() == 5
