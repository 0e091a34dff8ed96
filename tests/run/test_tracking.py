"""Records in every format, read back by other programs than the one that wrote."""

import json
import os
import sys
import time

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.run import runner, tracking
from tests import tiny

SETTINGS = {"data.alpha": 0.1, "model.others": ()}


def filled(workdir, **changes):
    tracker = tracking.Tracker(workdir, settings=SETTINGS, **changes)
    tracker.record("init", "round", 2, {"loss": 1.5})
    tracker.record("init", "round", 4, {"loss": 0.5})
    film = np.zeros((2, 3, 4, 8, 8, 1), np.uint8)
    tracker.pictures("generators", {"film": film, "client": np.arange(2)})
    tracker.histograms("init", {"kernel": np.arange(10.0)})
    tracker.results({"test/final": 0.9})
    tracker.close()


def test_metrics_load_into_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    filled(tmp_path, tensorboard=False)
    frame = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert frame.loss.tolist() == [1.5, 0.5]
    assert frame.step.tolist() == [2, 4]


def test_tensorboard_reads_every_kind(tmp_path):
    from tensorboardX.proto import event_pb2

    filled(tmp_path, tensorboard=True)
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
    filled(tmp_path, tensorboard=False, wandb=True)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wanted = (b"init/loss", b"data.alpha", b"test/final", b"generators/film")
    # Its service writes when it likes.
    for _ in range(100):
        data = written.read_bytes()
        if all(text in data for text in wanted):
            return
        time.sleep(0.1)
    pytest.fail(f"not all of {wanted} in {written}")


def test_wandb_that_is_not_installed_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(
        runner.importlib.util, "find_spec", lambda name: None if name else name
    )
    with pytest.raises(errors.ConfigError, match="needs the package wandb"):
        runner.Experiment(tiny.study(log__wandb=True), tmp_path)


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
