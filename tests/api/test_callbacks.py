"""Callbacks: what they are told, and what they end."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import mosaic_jax as mj
from mosaic_jax.core import errors
from mosaic_jax.run import environment
from mosaic_jax.run.callbacks import Round
from tests import running, tiny
from tests.api.test_study import Net, config, images

ROUNDS = {"init__rounds": 6, "evaluation__every": 2}


def study(workdir, *callbacks, **changes):
    data = mj.data.arrays(*images())
    return mj.Study(
        config(**ROUNDS | changes), workdir, model=Net(), data=data, callbacks=callbacks
    )


class Diary(mj.Callback):
    """Writes down what it is told; no dataclass, as it ends nothing."""

    def __init__(self):
        self.lines, self.kernels = [], []

    def on_stage_start(self, stage):
        self.lines.append(f"{stage} starts")

    def on_stage_end(self, stage, record):
        self.lines.append(f"{stage} ends: {len(record.history)} records")

    def on_round_end(self, state):
        assert state.metrics.keys() >= {"loss", "test_accuracy"}
        assert [row["step"] for row in state.history][-1] == state.number
        self.lines.append(f"{state.stage} {state.number} of {state.of}")
        params = state.model.params
        self.kernels.append(np.asarray(params["Dense_1"]["kernel"]))


@dataclasses.dataclass(frozen=True)
class EndAt(mj.Callback):
    """Ends a stage after so many rounds."""

    number: int = 4

    def may_stop(self, stage):
        return stage == "init"

    def on_round_end(self, state):
        return state.number >= self.number


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that only a diary watched, and the diary."""
    diary = Diary()
    return study(tmp_path_factory.mktemp("runs") / "whole", diary).run(), diary


def test_what_a_callback_is_told(whole):
    result, diary = whole
    rounds = ["init 2 of 6", "init 4 of 6", "init 6 of 6"]
    assert diary.lines == ["init starts", *rounds, "init ends: 3 records"]
    final = result.models["final"].variables["params"]["Dense_1"]["kernel"]
    np.testing.assert_array_equal(diary.kernels[-1], final)
    assert not np.array_equal(diary.kernels[0], final)


def test_watching_changes_no_fingerprint(whole):
    assert study(whole[0].workdir).fingerprints() == whole[0].summary.stages


def test_a_stage_that_is_ended(whole, tmp_path):
    """Model and costs are those of the rounds that were run; it is another stage."""
    full, diary = whole
    ended = study(tmp_path / "ended", EndAt(4)).run()
    kernel = ended.models["final"].variables["params"]["Dense_1"]["kernel"]
    np.testing.assert_array_equal(kernel, diary.kernels[1])
    assert (full.summary.rounds, ended.summary.rounds) == (6, 4)
    sent = [one.summary.communication_bytes["up"]["models"] for one in (full, ended)]
    assert sent[1] == sent[0] * 4 / 6
    flops = [one.summary.flops["init"] for one in (full, ended)]
    assert flops[1] == pytest.approx(flops[0] * 2 / 3)
    assert ended.summary.stages != full.summary.stages
    other = study(tmp_path / "ended", EndAt(5)).fingerprints()
    assert other not in (ended.summary.stages, full.summary.stages)


def test_an_ended_stage_is_ended_there_after_a_crash(whole, tmp_path):
    again = study(tmp_path / "crashed", EndAt(4))
    running.stop_after(again._experiment, 2)  # killed when round 4 was saved
    kernel = again.run().models["final"].variables["params"]["Dense_1"]["kernel"]
    np.testing.assert_array_equal(kernel, whole[1].kernels[1])


def round_of(values, metric="validation_accuracy"):
    history = [{"step": i + 1, metric: value} for i, value in enumerate(values)]
    return Round("init", len(values), 9, history[-1], history, ())


@pytest.mark.parametrize(
    ("values", "fields", "ends"),
    [
        ([0.1, 0.2, 0.3], {}, False),
        ([0.3, 0.2, 0.3], {}, True),
        ([0.3, 0.2, 0.31], {}, False),
        ([0.3, 0.2, 0.31], {"min_gain": 0.02}, True),
        ([0.3, 0.2], {}, False),
        ([2.0, 1.0, 0.5], {"metric": "loss"}, False),
        ([0.5, 1.0, 2.0], {"metric": "loss"}, True),
    ],
)
def test_early_stopping(values, fields, ends):
    fields = {"patience": 2} | fields
    state = round_of(values, fields.get("metric", "validation_accuracy"))
    assert mj.EarlyStopping(**fields).on_round_end(state) is ends


class Broken(mj.Callback):
    def on_stage_start(self, stage):
        raise KeyError("lost")


class Unannounced(mj.Callback):
    def on_round_end(self, state):
        return True


class Several(mj.Callback):
    def on_stage_start(self, stage):
        raise errors.SomeFailed({"a": "lost"})


class Mutable(mj.Callback):
    def may_stop(self, stage):
        return True


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (
            Diary,
            r"callbacks: <class .*Diary'>: must be instances of mosaic_jax.Callback",
        ),
        (Mutable(), "callbacks: Mutable: must be a frozen dataclass, as it may end"),
        (mj.EarlyStopping(patience=0), r"EarlyStopping.patience = 0: must be >= 1"),
        (Broken(), r"callback Broken.on_stage_start, init: KeyError: 'lost'"),
        (Several(), r"callback Several.on_stage_start, init: a: lost"),
        (
            Unannounced(),
            r"Unannounced.on_round_end, init, round 2: ends the stage: may_",
        ),
        (
            mj.EarlyStopping("acc"),
            r"round 2: EarlyStopping.metric = 'acc': known: loss",
        ),
        (
            mj.EarlyStopping("tst_accuracy"),
            r"^EarlyStopping.metric = 'tst_accuracy': did you mean 'test_accuracy'",
        ),
    ],
)
def test_callbacks_that_are_wrong(callback, told, tmp_path):
    with pytest.raises(errors.MosaicError, match=told):
        study(tmp_path / "run", callback).run()


class Exits(mj.Callback):
    def on_stage_start(self, stage):
        raise SystemExit("enough")


def test_a_run_that_a_callback_exits_counts_as_failed(tmp_path):
    with pytest.raises(SystemExit):
        study(tmp_path / "run", Exits()).run()
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert (progress["state"], progress["why"]) == ("failed", "SystemExit: enough")


def test_validation_images_are_asked_for_before_any_round(tmp_path):
    told = "EarlyStopping.metric = 'validation_accuracy': must be another, or data.val"
    with pytest.raises(errors.ConfigError, match=told):
        study(tmp_path, mj.EarlyStopping(), data__validation=0.0)
    study(tmp_path, mj.EarlyStopping("loss"), data__validation=0.0)


def test_rounds_before_generators_of_parts_are_not_ended(tmp_path):
    changes = {"model__name": "cnn", "init__method": "fedrolex"}
    told = "EarlyStopping: must not end stage 'init' where clients hold parts"
    with pytest.raises(errors.ConfigError, match=told):
        mj.Study(tiny.config(**changes), tmp_path, callbacks=[mj.EarlyStopping()])
    last = mj.EarlyStopping(stages=("finetune",))
    mj.Study(tiny.config(**changes), tmp_path, callbacks=[last])


def test_notebooks_have_bars(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert environment.progress_bar(
        total=3
    ).disable  # the output of tests is no terminal
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    bar = environment.progress_bar(total=3)
    assert not bar.disable and bar.total == 3
    bar.close()
