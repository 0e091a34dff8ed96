"""What programs do alike: exit codes, signals, and files that are no files."""

import json
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mosaic_jax.cli import launch
from mosaic_jax.core import errors, files
from mosaic_jax.data import partition, sources
from mosaic_jax.report import figures
from mosaic_jax.run import programs, tracking
from mosaic_jax.run.interruption import Interruption
from tests import tiny

DEEP = "[" * 100_000


def one_line(capsys, call):
    """The one line that a program which ends with code 2 tells."""
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_is_left_out_of_a_folder(tmp_path, caplog, kind):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            grey = np.full((16, 16), 9 * i, np.uint8)
            Image.fromarray(grey).save(tmp_path / name / f"{i}.png")
    odd = tmp_path / "a" / "odd.png"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("/dev/zero")
    _, found = sources.load("folder", tmp_path)
    assert len(found.train_label) + len(found.test_label) == 10
    assert f"{odd}: no regular file: left out" in caplog.text


# --- splits and records


def as_csv(path, text):
    path.write_bytes(text)
    return partition.read(path, num_images=4, num_clients=2)


def test_a_csv_as_excel_writes_it(tmp_path):
    rows = b"client,index\r\n0,1\r\n1,2\r\n0,3\r\n"
    for name in ("split.csv", "SPLIT.CSV"):
        parts = as_csv(tmp_path / name, b"\xef\xbb\xbf" + rows)
        assert [part.tolist() for part in parts] == [[1, 3], [2]]
    sealed = json.dumps({"clients": [[0], [1]]}).encode()
    assert len(as_csv(tmp_path / "split.json", b"\xef\xbb\xbf" + sealed)) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.json", DEEP),
        ("split.json", '{"clients": ' + DEEP),
        ("split.json", '{"clients": ' + "[" * 500 + "]" * 500 + "}"),
        ("split.csv", "client,index\n0," + "1" * 200_000),
        ("split.csv", "client,index\n" + "0" * 200_000 + ",1"),
        ("split.csv", "client,index\n0\n"),
    ],
)
def test_splits_past_what_parsers_take(tmp_path, name, text):
    with pytest.raises(errors.DataError, match="cannot be read: ") as error:
        as_csv(tmp_path / name, text.encode())
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_split_from_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "split.csv")
    with pytest.raises(errors.DataError, match="must be a regular file"):
        partition.read(tmp_path / "split.csv", num_images=4, num_clients=2)


def test_deep_records(tmp_path):
    (tmp_path / "done.json").write_text(DEEP)
    with pytest.raises(errors.CheckpointError, match=r"done.json: is damaged"):
        files.read_json(tmp_path / "done.json")
    whole = {"stage": "init", "loop": "round", "step": 2}
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP}\n{json.dumps(whole)}\n")
    tracker = tracking.Tracker(tmp_path)
    assert tracker.history("init") == [whole]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == whole


# --- errors


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (errors.DataError("a\nb"), 2, "error: a\nerror: b\n"),
        (OSError(28, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (
            MemoryError(),
            2,
            "error: out of memory: MemoryError: what was saved is kept\n",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "error: RESOURCE_EXHAU"),
        (
            errors.Interrupted(15),
            143,
            "interrupted by SIGTERM; state saved: the same command goes on from",
        ),
    ],
)
def test_exit_codes(capsys, error, code, expected):
    def program():
        raise error

    assert programs.exit_code(program) == code
    assert capsys.readouterr().err.startswith(expected)
    assert programs.exit_code(lambda: None) == 0
    with pytest.raises(RuntimeError, match="a fault"):
        programs.exit_code(lambda: exec("raise RuntimeError('a fault')"))


# --- signals


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "counts.png"
    figures.save(figures.label_counts(np.ones((2, 3), int)), path)
    before = path.read_bytes()

    def broken(self, file, **_):
        file.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.Figure, "savefig", broken)
    with pytest.raises(KeyboardInterrupt):
        figures.save(figures.label_counts(np.ones((2, 3), int)), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_save(signum):
    with Interruption() as interruption:
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        assert interruption.signum == signum


def test_what_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not interruption.signum
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_out_of_memory_in_a_study_is_one_line(tmp_path, capsys, monkeypatch):
    def build(*_, **__):
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr(launch.experiments, "make", build)
    told = one_line(capsys, lambda: launch.run(tiny.config().to_dict(), tmp_path))
    assert told.startswith("error: out of memory: Unable to allocate 7.28 TiB")


# --- records


def test_replacing_records_takes_time_in_proportion(tmp_path):
    def seconds(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = [
            {"stage": "init", "loop": "round", "step": i, "loss": 0.5 * i}
            for i in range(count)
        ]
        other = {"stage": "meta", "loop": "head", "step": 1}
        text = "".join(json.dumps(row) + "\n" for row in [*rows, other])
        (folder / "metrics.jsonl").write_text(text)
        tracker = tracking.Tracker(folder)
        start = time.process_time()
        tracker.replace("init", rows[: count // 2])
        taken = time.process_time() - start
        assert tracker.history("init") == rows[: count // 2]
        assert tracker.history("meta") == [other]
        return taken

    assert seconds(16_000) < 1
