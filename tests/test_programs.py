"""Every program: bad input is one line and code 2, Ctrl-C one line and code 130."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mosaic_jax import cli, errors, experiment, files, programs, sweep, tracking
from mosaic_jax.data import __main__ as data_program
from mosaic_jax.data import partition, sources
from mosaic_jax.loop import Interruption
from mosaic_jax.report import figures, page
from tests import test_sources, tiny

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "tests" / "end_to_end" / "tiny_config.py")
DEEP = "[" * 100_000


def one_line(capsys, call):
    """The one line that a program which ends with code 2 tells."""
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- python -m mosaic_jax.data


def test_a_file_is_no_folder_of_images(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("x")
    arguments = ["folder", "--data_dir", str(path)]
    told = one_line(capsys, lambda: data_program.main(arguments))
    assert f"data.dir = {path}: must be a folder of images" in told
    arguments = ["npz", "--data_dir", str(tmp_path)]
    told = one_line(capsys, lambda: data_program.main(arguments))
    assert f"data.dir = {tmp_path}: must be an npz file" in told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing/counts.png", "must lie in a folder that exists"),
        ("counts.docx", "must end in one of .pdf, .png, .svg"),
        ("counts", "must end in one of"),
        ("folder.png", "must be a file, not a folder"),
    ],
)
def test_outputs_that_cannot_be_are_told_before_work(
    tmp_path, capsys, monkeypatch, name, expected
):
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / name
    arguments = ["digits", "--split", "iid", "--output", str(path)]
    told = one_line(capsys, lambda: data_program.main(arguments))
    assert f"--output = {path}: {expected}" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_clients", "0"], "data.num_clients = 0: must be in [1, "),
        (["--alpha", "0"], "data.alpha = 0.0: must be in ["),
        (["--alpha", "nan"], "data.alpha = nan: must be in ["),
        (["--seed", "-1"], "seed of the split = -1: must be in [0, "),
    ],
)
def test_splits_that_cannot_be_drawn(tmp_path, capsys, words, expected):
    output = str(tmp_path / "counts.png")
    arguments = ["digits", "--split", "dirichlet_balanced", "--output", output, *words]
    assert expected in one_line(capsys, lambda: data_program.main(arguments))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_is_left_out_of_a_folder(tmp_path, caplog, kind):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            content = test_sources.png(9 * i, 16, "L")
            (tmp_path / name / f"{i}.png").write_bytes(content)
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
    tracker = tracking.Tracker(tmp_path, tensorboard=False)
    assert tracker.history("init") == [whole]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == whole


# --- python -m mosaic_jax.sweep


def config_of(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        (
            "x = 1",
            "AttributeError: module 'sweep_config' has no attribute 'get_config'",
        ),
        ("def get_config(): return 1", "AttributeError: 'int' object has no attribute"),
        ("def get_config(): raise KeyError('steps')", "KeyError: 'steps'"),
        ("def get_config():\n    return get_config()", "RecursionError: maximum"),
    ],
)
@pytest.mark.parametrize("suffix", [".py", ""])
def test_configs_of_a_sweep_may_raise_anything(
    tmp_path, capsys, text, expected, suffix
):
    path = config_of(tmp_path / f"config{suffix}", text)
    told = one_line(capsys, lambda: sweep.main(["--config", path]))
    assert f"--config = {path!r}: {expected}" in told


def test_a_variant_that_the_config_does_not_take(tmp_path, capsys):
    path = config_of(tmp_path / "config.py", "def get_config(): pass")
    told = one_line(capsys, lambda: sweep.main(["--config", f"{path}:small"]))
    assert (
        "TypeError: get_config() takes 0 positional arguments but 1 was given" in told
    )


@pytest.mark.parametrize(
    "value", ["", "(", "x", "1, 0.5), (", "[]" * 500, "-" * 100_000 + "1", "1" * 5000]
)
@pytest.mark.parametrize("field", ["budgets.rates", "data.alpha", "distill.steps"])
def test_grid_values_of_no_kind(tmp_path, capsys, field, value):
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "x")]
    arguments.append(f"--grid={field}={value}")
    told = one_line(capsys, lambda: sweep.main(arguments))
    assert told.startswith("error: --grid") and len(told) < 500
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("inside", ["", "cell"])
def test_a_workdir_that_is_a_file(tmp_path, capsys, inside):
    path = tmp_path / "file"
    path.write_text("x")
    arguments = ["--config", CONFIG, "--workdir", str(path / inside)]
    told = one_line(capsys, lambda: sweep.main(arguments))
    assert told.startswith(f"error: --workdir = {path / inside}")
    assert told.endswith(f": {path} is no folder\n")
    told = one_line(capsys, lambda: cli.run(tiny.config().to_dict(), path / inside))
    assert told.endswith(f": {path} is no folder\n")


def test_a_script_for_slurm_that_cannot_be_written(tmp_path, capsys):
    path = tmp_path / "missing" / "sweep.sh"
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path), "--slurm", str(path)]
    told = one_line(capsys, lambda: sweep.main(arguments))
    assert f"--slurm = {path}: must lie in a folder that exists" in told


# --- what every program does with an error


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
        (errors.Interrupted(15), 143, "interrupted by SIGTERM; state saved\n"),
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

MAIN = {
    "launch": [str(ROOT / "launch.py"), "--config", CONFIG],
    "data": ["-m", "mosaic_jax.data", "digits"],
    "report": ["-m", "mosaic_jax.report", "nowhere"],
    "sweep": ["-m", "mosaic_jax.sweep", "--config", CONFIG],
}


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("module", ["numpy", "jax", "matplotlib"])
def test_ctrl_c_while_modules_are_imported(tmp_path, name, module):
    """Python, asked to, tells of each module that it has imported."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-v",
            *(
                str(ROOT / "launch.py") if word == "launch.py" else word
                for word in MAIN[name]
            ),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    told = []
    with process:
        for line in process.stderr:
            told.append(line)
            if line.startswith(f"import '{module}."):
                process.send_signal(signal.SIGINT)
                break
        told += process.stderr.readlines()
    assert process.returncode == 130
    assert told.count("interrupted\n") == 1
    assert not any(line.startswith("Traceback") for line in told)
    assert not list(tmp_path.iterdir())


WRITING = """
import sys, time
from mosaic_jax import cli, files, programs
from mosaic_jax.report import figures
programs.end_on_interrupt()
whole = files.write_bytes
def slowly(path, data):
    if path.suffix == ".png":
        print("drawing", flush=True)
        time.sleep(0.1)
    whole(path, data)
files.write_bytes = slowly
from mosaic_jax import report
print(report.write(__import__("pathlib").Path(sys.argv[1])))
"""


def test_ctrl_c_while_a_report_is_written(tmp_path):
    changes = {"method": "federated", "init__rounds": 1, "warmup__rounds": 1}
    experiment.Experiment(tiny.study(**changes), tmp_path).run()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "drawing\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted\n")
    assert not (tmp_path / "report.html").exists()
    page.write(tmp_path)
    assert (tmp_path / "report.html").exists()


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

    monkeypatch.setattr(cli, "studies", build)
    told = one_line(capsys, lambda: cli.run(tiny.config().to_dict(), tmp_path))
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
        tracker = tracking.Tracker(folder, tensorboard=False)
        start = time.process_time()
        tracker.replace("init", rows[: count // 2])
        taken = time.process_time() - start
        assert tracker.history("init") == rows[: count // 2]
        assert tracker.history("meta") == [other]
        return taken

    assert seconds(16_000) < 1
