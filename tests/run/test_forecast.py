"""What a study is told to cost before it runs, for devices that are not here."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import programs
from mosaic_jax.core.costs import Counts, Loop
from mosaic_jax.core.steps import Repeated, Steps
from mosaic_jax.data import sources
from mosaic_jax.fl.robust import Median
from mosaic_jax.fl.sending import Sending
from mosaic_jax.run import devices, forecast, memory, rehearsal, study
from tests import tiny


def test_a_roofline():
    device = devices.DEVICES["a100"]
    assert device.seconds(2.039e12, 0, 0) == 1
    assert device.seconds(2.039e12, 312e12, 0) == pytest.approx(1 / 0.75)
    assert device.seconds(0, 0, 500_000) == pytest.approx(1)
    inner = Loop(Counts(bytes=2.039e12), trips=None)
    assert device.roofline(Loop(Counts(), (inner,), 3), unknown=2) == 6


def test_an_array_that_two_artifacts_hold_counts_once():
    shared, own = np.zeros(1000, np.float32), np.zeros(10, np.float32)
    resident = [{"experts": shared}, {"teacher": {"experts": shared, "head": own}}]
    assert rehearsal._bytes_of_others(resident, {}) == 4040
    assert rehearsal._bytes_of_others(resident, {"teacher": own}) == 4000
    assert rehearsal._bytes_of_others(resident, {"experts": shared}) == 40


def test_programs_of_one_name_are_not_taken_for_each_other():
    small, large = (lambda x: x), (lambda x: x @ x @ x)
    x, examine = np.zeros((8, 8), np.float32), rehearsal.Counting()
    seen = [examine(jax.jit(f), (x,), {}, "audit lambda") for f in (small, large)]
    assert [one.loop.total().flops for one in seen] == [0, 2 * 2 * 8**3]
    again = examine(jax.jit(small), (x,), {}, "other lambda")
    assert again is seen[0]


def test_nor_are_loops_of_one_name():
    def small(args, state, number):
        return state + 1, {}

    def large(args, state, number):
        return state @ state, {}

    examine, x = rehearsal.Counting(), np.zeros((8, 8), np.float32)
    flops = []
    for step in (small, large):
        steps = Steps("train", Repeated(step), (), x, 4, 2, 1)
        args = (), x, np.int32(0), np.int32(1)
        seen = examine(jax.jit(steps.window), args, {}, "any train")
        flops.append(seen.loop.total().flops)
    assert flops[0] == 0 < flops[1]


def told(capsys, *, target, **fields):
    config = tiny.config(method="federated", warmup__rounds=0, **fields).to_dict()
    code = launch.run(config, pathlib.Path("never"), dry_run="count", target=target)
    return code, capsys.readouterr()


def test_a_device_that_is_not_here(capsys):
    # However many the study asks for, it is told for one.
    code, (output, _) = told(capsys, target="v5e", compute__devices=64)
    assert code == 0
    assert "fits one TPU v5e: needs 0.0 GB of the 17.2 GB that programs get" in output
    assert "unknown" not in output
    assert programs.target() is None
    code, (_, errors) = told(capsys, target="v5")
    assert code == 2 and errors.startswith("error: --target = 'v5': did you mean")
    config = tiny.config().to_dict()
    assert launch.run(config, pathlib.Path("never"), target="v5e") == 2
    assert (
        capsys.readouterr().err == "error: --target = v5e: must come with --dry_run\n"
    )


def test_a_study_that_does_not_fit(monkeypatch, capsys):
    small = dataclasses.replace(devices.DEVICES["v5e"], memory=1000)
    monkeypatch.setitem(devices.DEVICES, "v5e", small)
    _, (output, _) = told(capsys, target="v5e", compute__clients_at_once=3)
    assert "does not fit one TPU v5e" in output
    assert "lower compute.clients_at_once" in output


def test_data_that_are_not_there_are_made_up(monkeypatch, tmp_path, capsys):
    known = sources.SOURCES.find("cifar10")
    small = dataclasses.replace(known, num_images=(600, 100))
    monkeypatch.setitem(sources.SOURCES._entries, "cifar10", small)
    fields = {"data__name": "cifar10", "data__dir": str(tmp_path)}
    code, (output, _) = told(capsys, target="h100", **fields)
    assert code == 0
    assert f"cifar10 is not prepared in {tmp_path}: labels are made up" in output
    assert "\ninit " in output
    assert not list(tmp_path.iterdir())


def of_rounds(**fields):
    """What is told of the rounds of a study on an H100."""
    with programs.traced_for(devices.target(devices.DEVICES["h100"])):
        work = study.build(tiny.study(method="federated", warmup__rounds=0, **fields))
        (found,) = rehearsal.rehearse(work, rehearsal.Counting())
        (part,) = (part for part in found.parts if part.name == "round")
        (told,) = forecast.forecast(work, devices.DEVICES["h100"])
    return work, part, told


def test_rounds_are_told_by_training_steps_of_all_clients():
    work, part, told = of_rounds(init__rounds=4, local__steps=2)
    assert part.steps == told.steps == 4 * 2
    step = part.training.iteration()
    forward = work.classifier.flops(work.data.info.image_shape)
    # Three clients; that of the first layer's input is not computed.
    assert step.flops == pytest.approx(3 * 16 * 3 * forward, rel=0.2)
    _, twice, more = of_rounds(init__rounds=8, local__steps=2)
    assert twice.steps == 16 and more.seconds > told.seconds
    assert more.down == 2 * told.down


def test_uploads_that_are_kept_one_by_one_need_memory():
    fields = {"data__num_clients": 30, "data__split": "iid", "model__width": 16}
    fields |= {"compute__clients_at_once": 1, "local__batch_size": 1}
    work, summed, _ = of_rounds(**fields)
    _, kept, _ = of_rounds(aggregation__rule="median", **fields)
    uploads = memory.uploads_bytes(
        dataclasses.replace(work, sending=Sending(rule=Median()))
    )
    assert kept.seen.memory - summed.seen.memory > 0.9 * uploads


def test_clients_in_groups_need_less_memory():
    fields = {"local__batch_size": 256, "model__width": 16}
    _, together, _ = of_rounds(compute__clients_at_once=3, **fields)
    _, alone, _ = of_rounds(compute__clients_at_once=1, **fields)
    assert alone.steps == 3 * together.steps
    assert 2 * alone.seen.memory < together.seen.memory
