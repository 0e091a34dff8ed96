"""Records in every format, read back by other programs than the one that wrote."""

import json
import os
import time
from typing import ClassVar

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.run import runner, trackers, tracking
from mosaic_jax.run.callbacks import Callback
from tests import tiny

SETTINGS = {"data.alpha": 0.1, "model.others": ()}


def filled(workdir, *callbacks):
    workdir.mkdir(exist_ok=True)
    tracker = tracking.Tracker(workdir, settings=SETTINGS, callbacks=callbacks)
    tracker.record("init", "round", 2, {"loss": 1.5})
    tracker.record("init", "round", 4, {"loss": 0.5})
    film = np.zeros((2, 3, 4, 8, 8, 1), np.uint8)
    tracker.pictures("generators", {"film": film, "client": np.arange(2)})
    tracker.parameters("init", "model", {"kernel": np.arange(10.0)})
    tracker.results({"test/final": 0.9})
    tracker.close()


def test_metrics_load_into_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    filled(tmp_path)
    frame = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert frame.loss.tolist() == [1.5, 0.5]
    assert frame.step.tolist() == [2, 4]


class Heard(Callback):
    """What a callback is told, in order."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda *given: self.calls.append((name, *given))


def test_callbacks_are_told_what_is_recorded(tmp_path):
    heard = Heard()
    filled(tmp_path, heard)
    start, *records, pictures, parameters, end = heard.calls
    assert start == ("on_study_start", tmp_path, SETTINGS)
    assert records == [
        ("on_record", "init", "round", 2, {"loss": 1.5}),
        ("on_record", "init", "round", 4, {"loss": 0.5}),
    ]
    assert pictures[:2] == ("on_pictures", "generators")
    assert pictures[2].keys() == {"film"}
    assert pictures[2]["film"].shape == (48, 32, 3)
    assert parameters[:3] == ("on_parameters", "init", "model")
    assert end == ("on_study_end", {"test/final": 0.9})
    # Another process than the first tells nothing.
    silent = Heard()
    tracking.Tracker(tmp_path, callbacks=(silent,), writes=False).close()
    assert silent.calls == []


def test_tensorboard_reads_every_kind(tmp_path):
    from tensorboardX.proto import event_pb2

    filled(tmp_path, trackers.TensorBoard())
    kinds, scalars = set(), {}
    for path in (tmp_path / "tensorboard").rglob("*tfevents*"):
        for payload in tfrecords(path):
            event = event_pb2.Event.FromString(payload)
            for value in event.summary.value:
                kinds.add(value.WhichOneof("value"))
                if value.HasField("simple_value"):
                    scalars[value.tag, event.step] = value.simple_value
                if value.metadata.plugin_data.plugin_name == "hparams":
                    kinds.add("hparams")
    assert {"simple_value", "image", "histo", "hparams"} <= kinds
    assert scalars["init/loss", 4] == 0.5


def tfrecords(path):
    """Payloads of a TFRecord file."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 8], "little")
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    filled(tmp_path, trackers.WandB())
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wanted = (b"init/loss", b"data.alpha", b"test/final", b"generators/film")
    # Its service writes when it likes.
    for _ in range(100):
        data = written.read_bytes()
        if all(text in data for text in wanted):
            return
        time.sleep(0.1)
    pytest.fail(f"not all of {wanted} in {written}")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_with_a_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for _ in range(2):
        filled(tmp_path / "run", trackers.MLflow())
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(
        [client.get_experiment_by_name("mosaic_jax").experiment_id]
    )
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {"data.alpha": "0.1", "model.others": "()"}
    assert run.data.metrics == {"init/loss": 0.5, "test/final": 0.9}
    losses = client.get_metric_history(run.info.run_id, "init/loss")
    assert [(one.step, one.value) for one in losses] == 2 * [(2, 1.5), (4, 0.5)]
    (film,) = client.list_artifacts(run.info.run_id, "generators")
    assert film.path == "generators/film.png"


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_with_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    for _ in range(2):
        filled(tmp_path / "run", trackers.Trackio())
    (run,) = trackio.Api().runs("mosaic_jax")
    assert run.name.startswith("run-")
    assert run.config["data.alpha"] == 0.1
    rows = trackio.SQLiteStorage.get_logs("mosaic_jax", run.name)
    losses = [row["init/loss"] for row in rows if "init/loss" in row]
    assert losses == 2 * [1.5, 0.5]
    assert sum("generators/film" in row for row in rows) == 2
    assert rows[-1]["test/final"] == 0.9


@pytest.mark.parametrize("name", sorted(set(trackers.TRACKERS) - {"tensorboard"}))
def test_what_is_not_installed_is_said_at_once(name, tmp_path, monkeypatch):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util,
        "find_spec",
        lambda wanted: None if wanted == name else find(wanted),
    )
    with pytest.raises(errors.ConfigError, match=f"needs the package {name}: pip in"):
        runner.Experiment(tiny.study(log__trackers=(name,)), tmp_path)


class Whole(Callback):
    """A tracker of one's own, which is a callback like any other."""

    told: ClassVar[list[str]] = []

    def on_stage_start(self, stage):
        self.told.append(f"{stage} starts")

    def on_record(self, stage, loop, step, metrics):
        self.told.append(f"{stage} {loop} {step}")


class Broken(Callback):
    def __init__(self):
        raise KeyError("key")


def test_a_tracker_of_ones_own(tmp_path):
    fields = {"method": "federated", "init__rounds": 1, "model__name": "mlp"}
    fields["log__trackers"] = (f"{__name__}:Whole",)
    runner.Experiment(tiny.study(**fields), tmp_path).run()
    assert Whole.told == ["init starts", "init round 1"]
    told = "log.trackers: .*:Broken: KeyError: 'key'"
    with pytest.raises(errors.ConfigError, match=told):
        trackers.named([f"{__name__}:Broken"])


def test_the_wrong_names_of_trackers():
    told = r"log.trackers = \('tensorbord',\): must be different ones of tensorboard, w"
    with pytest.raises(errors.ConfigError, match=told):
        tiny.study(log__trackers=("tensorbord",))
    told = "must be a class that inherits mosaic_jax.Callback and needs no arguments"
    with pytest.raises(errors.ConfigError, match=told):
        trackers.named(["tests.run.test_tracking:filled"])


class TestProgress:
    def begin(self, tmp_path, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(tracking.time, "monotonic", lambda: self.now)
        flops = {"init": 30.0, "meta": 60.0, "distill": 10.0}
        self.path = tmp_path / "progress.json"
        return tracking.Progress([tmp_path], flops, writes=True)

    def read(self):
        return json.loads(self.path.read_text())

    def test_time_left_by_hand(self, tmp_path, monkeypatch):
        progress = self.begin(tmp_path, monkeypatch)
        progress.begin("init", "round", 0, 10, 32)
        self.now += 20
        note = progress.update(5, {"loss": 1.0}, 2 * 10**9)
        found = self.read()
        # Half of 30 in 20 s: 85 are left at 0.75 per second.
        assert found["study_seconds_left"] == pytest.approx(85 / 0.75)
        assert found["stage_seconds_left"] == pytest.approx(20)
        assert found["samples_per_second"] == pytest.approx(5 * 32 / 20)
        assert found["state"] == "running"
        assert note == "8 samples/s, left: stage 0:20, study 1:53, 2.0 GB"

    def test_compiling_says_nothing_of_the_speed(self, tmp_path, monkeypatch):
        progress = self.begin(tmp_path, monkeypatch)
        progress.enter("init")
        progress.begin("init", "round", 0, 10, 32)
        assert progress.alive() == ("init: compiling, to begin with round 1 of 10", 100)
        self.now += 50
        progress.compiled()
        self.now += 20
        progress.update(5, {}, 0)
        assert self.read()["stage_seconds_left"] == pytest.approx(20)
        assert self.read()["study_seconds_left"] == pytest.approx(85 / 0.75)
        assert progress.alive() == ("init: at round 6 of 10", 170)
        assert self.read()["doing"] == "init: at round 6 of 10"

    def test_its_file_is_renewed_while_nothing_new_is_told(self, tmp_path, monkeypatch):
        progress = self.begin(tmp_path, monkeypatch)
        progress.alive()
        assert not self.path.exists()
        progress.enter("init")
        written = self.path.read_bytes()
        os.utime(self.path, (0, 0))
        progress.alive()
        assert self.path.stat().st_mtime > 0 and self.path.read_bytes() == written

    def test_reused_stages_count_neither_way(self, tmp_path, monkeypatch):
        progress = self.begin(tmp_path, monkeypatch)
        progress.finished("init", reused=True)
        progress.begin("meta", "head", 0, 4, 1)
        self.now += 30
        progress.update(2, {}, 0)
        assert self.read()["study_seconds_left"] == pytest.approx(40)
        assert self.read()["stages_done"] == ["init"]

    def test_it_ends(self, tmp_path, monkeypatch):
        progress = self.begin(tmp_path, monkeypatch)
        for stage in ("init", "meta", "distill"):
            progress.finished(stage, reused=False)
        assert self.read()["state"] == "done"
        progress.stopped("interrupted")
        assert self.read()["state"] == "interrupted"
        progress.stopped("failed", "a reason")
        assert (self.read()["state"], self.read()["why"]) == ("failed", "a reason")
