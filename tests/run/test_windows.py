"""Windows of steps run in parts: to the same bits, and within the time after a signal.

Of every kind of loop: steps repeated on devices, on the host, and clients' own.
"""

import dataclasses
import itertools
import json
import os
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng
from mosaic_jax.core.steps import OnHost, Repeated, Steps
from mosaic_jax.fl import parallel
from mosaic_jax.run import checkpoint, loop, pace, runner
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.pace import Pace
from mosaic_jax.stages import local
from tests import launched, running, tiny

CUTS = [(0, 7), (0, 1, 7), (0, 3, 4, 7), tuple(range(8))]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def in_parts(steps, cuts, place=lambda tree: jax.tree.map(jnp.asarray, tree)):
    """Bits of state and metrics of every window, each cut at those of `cuts`."""
    run, state = jax.jit(steps.work.run), steps.state
    empty = place(steps.work.empty(steps.args, state))
    found = []
    for begin in range(0, steps.num_steps, steps.every):
        edge, tally = steps.window_end(begin), empty
        for first, end in itertools.pairwise(min(begin + cut, edge) for cut in cuts):
            if first < end:
                state, tally, metrics = run(steps.args, state, tally, first, end)
        found += [*bits(state), *bits(metrics)]
    assert run._cache_size() == 1
    return found


def test_a_call_has_as_many_steps_as_were_measured():
    steady = Pace(2.0, 1000)
    sizes = []
    for _ in range(8):
        sizes.append(steady.steps)
        # Compiling takes a minute; a step, 1/64 s.
        steady.took(sizes[-1], 60 if len(sizes) == 1 else sizes[-1] / 64)
    assert sizes == [1, 1, 4, 16, 64, 128, 128, 128]
    assert steady.is_quick


def test_nor_more_than_a_window_nor_less_than_one():
    quick, slow = Pace(2.0, 3), Pace(2.0, 3)
    for seconds in (0.1, 0.1, 0.1):
        quick.took(quick.steps, seconds)
        slow.took(slow.steps, 100 * seconds)
    assert (quick.steps, quick.is_quick) == (3, True)
    assert (slow.steps, slow.is_quick) == (1, False)


@pytest.mark.parametrize("mean", [True, False])
def test_repeated_steps(mean):
    def step(args, state, number):
        state = jnp.sin(state * 1.1 + number) + args
        return state, {"loss": jnp.sum(state) / 3, "most": jnp.max(state)}

    steps = Steps("x", Repeated(step, mean), jnp.ones(3), jnp.ones(3), 17, 7, 1)
    whole, *others = (in_parts(steps, cuts) for cuts in CUTS)
    assert all(other == whole for other in others)


@pytest.mark.parametrize(
    ("at_once", "num_devices"),
    [(1, 1), (3, 1), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_own_steps_of_clients(at_once, num_devices):
    sizes, counts = np.array([5, 30, 12, 20, 1]), np.array([9, 17, 0, 13, 4])
    axis = parallel.build(sizes, at_once=at_once, num_devices=num_devices)
    context = types.SimpleNamespace(
        clients=axis.place(tiny.dataset(list(sizes))),
        axis=axis,
        settings=tiny.study(log__every_steps=7),
        mechanism=None,
    )

    def step(state, number, batch, client, each, shared, key):
        seen = jnp.mean(batch.image * batch.mask[:, None, None, None])
        state = jnp.sin(0.7 * state + seen + number)
        done = number > 11
        return state, {
            "loss": jnp.where(done, 0.0, state / 3),
            local.ACTIVE: (~done).astype(jnp.float32),
        }

    state = axis.replicate(np.zeros(len(sizes), np.float32))
    run = local.run_steps(
        context,
        "steps",
        step,
        state,
        counts,
        key=prng.root(0),
        batch_size=4,
        augmentation="crop_flip",
    )
    steps = run.send(None)
    whole, *others = (in_parts(steps, cuts, axis.replicate) for cuts in CUTS[::3])
    assert all(other == whole for other in others)


EVERY, STEPS = 5, 12


def looped(work=None, **changes):
    """A stage of one loop, whose windows end in a measure of their own."""

    def step(args, state, number):
        return state * 0.9 + number, {"loss": state / 3}

    state = yield Steps(
        "add",
        work or Repeated(step),
        jnp.zeros(()),
        jnp.float32(3.0),
        STEPS,
        every=EVERY,
        samples_per_step=1,
        measure=lambda args, state: {"measured": state * 2},
        **changes,
    )
    return float(state)


def records(each):
    """Those of a loop but for their times."""
    found = each.tracker.history("count", "add")
    return [{k: v for k, v in row.items() if k != "time"} for row in found]


@pytest.fixture
def undisturbed(loop_of, tmp_path):
    one = loop_of(tmp_path / "undisturbed")
    found = loop.run_stage([one], [looped()])
    assert [row["step"] for row in records(one)] == [5, 10, 12]
    assert {"loss", "measured"} <= records(one)[0].keys()
    return found, records(one)


@pytest.mark.parametrize("step", [3, 8])
def test_killed_in_a_window_it_goes_on_to_the_same_records(
    loop_of,
    tmp_path,
    monkeypatch,
    undisturbed,
    step,
):
    # No call has more than one step.
    one = loop_of(tmp_path / "run", grace=1e-9)
    with monkeypatch.context() as patch, pytest.raises(running.Killed):
        running.kill_at(patch, step)
        loop.run_stage([one], [looped()])
    again = loop_of(tmp_path / "run")
    assert loop.run_stage([again], [looped()]) == undisturbed[0]
    assert records(again) == undisturbed[1]


def test_seeds_together_in_parts(loop_of, tmp_path):
    def together(folder, grace):
        loops = [
            dataclasses.replace(
                loop_of(folder / str(i), seed=i, grace=grace), checkpoint_seconds=1e6
            )
            for i in range(2)
        ]
        found = loop.run_stage(loops, [looped(), looped()])
        return found, [records(one) for one in loops]

    assert together(tmp_path / "parts", 1e-9) == together(tmp_path / "whole", 10.0)


def test_a_signal_is_followed_within_the_time(loop_of, tmp_path):
    def step(args, state, number):
        time.sleep(0.01)
        return state + 1, {"loss": state}

    def stage():
        yield Steps("add", OnHost(step), (), np.zeros(()), 10**6, 10**6, 1)

    with Interruption() as interruption:
        one = loop_of(tmp_path / "run", interruption=interruption, grace=1.0)
        one = dataclasses.replace(one, checkpoint_seconds=1e6)
        sent = []

        def send():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Timer(1.5, send).start()
        with pytest.raises(errors.Interrupted):
            loop.run_stage([one], [stage()])
    assert time.monotonic() - sent[0] < 1.5
    (saved,) = (tmp_path / "run" / "checkpoints" / "add").glob("[0-9]*")
    assert int(saved.name) > 10


STUDIES = {
    "mosaic": {"refine__steps": 2, "distill__pool": 8, "audit__images": 8},
    "host": {
        "method": "federated",
        "init__method": "fedbn",
        "compute__client_state": "host",
        "warmup__rounds": 0,
    },
    "server": {
        "method": "federated",
        "server__method": "fedgen",
        "server__when": "every_round",
        "warmup__rounds": 0,
    },
    "prototypes": {"method": "federated", "init__method": "fedproto"},
}


def numbers(work):
    """Every stage's arrays, and what was recorded."""
    found = {}
    for stage in work.finished():
        saved = checkpoint.Checkpoints(stage.directory / "artifacts")
        latest = saved.latest()
        saved.close()
        found[stage.name] = bits(latest[1]) if latest else None
    lines = (work.workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return found, [{k: v for k, v in row.items() if k != "time"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_loop_of_a_study(tmp_path, monkeypatch, name):
    study = tiny.study(**STUDIES[name])
    whole = runner.Experiment(study, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pace, "GROWTH", 1000)
        whole.run()
    broken = runner.Experiment(study, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Pace, "took", lambda self, steps, seconds: None)
        running.stop_after(broken, 1)
        broken.run()
    assert numbers(broken) == numbers(whole)


@pytest.mark.slow
def test_a_process_with_a_huge_window_ends_in_time(tmp_path):
    grace = 4
    process = launched.start(
        tmp_path,
        "--config.method=federated",
        "--config.init.rounds=1000000",
        "--config.evaluation.every=1000000",
        "--config.log.checkpoint_seconds=1000000",
        f"--config.log.grace_seconds={grace}",
    )
    try:
        latest = time.monotonic() + 300
        while True:
            path = tmp_path / "progress.json"
            told = json.loads(path.read_text()) if path.exists() else {}
            if told.get("step", 0) > 100:
                break
            assert time.monotonic() < latest and process.poll() is None
            time.sleep(0.2)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        # With the end of the process itself, on a machine that others may use.
        assert time.monotonic() - begin < grace + 6
    finally:
        process.kill()
        process.stderr.close()
    assert list(tmp_path.glob("stages/init/*/checkpoints/round/[0-9]*"))
