"""The command line: errors, kills, signals."""

import fcntl
import json
import signal
import time

import pytest

from mosaic_jax.cli import run as program
from tests import running
from tests.launched import CONFIG, ROOT, run, stop_at

SHORT = ("--config.method=federated", "--config.warmup.rounds=4")
# A word of the log that shows the stage at work: in rounds, in the clients' own steps,
# in a stage without a loop, on the server. Every other stage: tests/faults, in the long
# form.
MOMENTS = [
    "init round 2 ",
    "experts local 2 ",
    "prototypes: running",
    "distill student 4 ",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished study of rounds alone, and its process."""
    workdir = tmp_path_factory.mktemp("short")
    done = run(workdir, *SHORT)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_output_ends_with_table_and_paths(short):
    workdir, done = short
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["accuracy", "test", "validation"]
    assert lines[-4] == f"summary  {workdir / 'summary.json'}"
    assert lines[-3] == f"report   {workdir / 'report.html'}"
    assert lines[-2].startswith("next     python launch.py --config ")
    assert (workdir / "report.html").exists()
    # Silent bars: the log is lines of text.
    assert "\r" not in done.stderr


@pytest.mark.slow
def test_killed_in_every_kind_of_stage_and_resumed(undisturbed, tmp_path):
    for moment in MOMENTS:
        code, log = stop_at(tmp_path, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, log
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert running.final_model(tmp_path) == running.final_model(undisturbed)
    summaries = [
        json.loads((workdir / "summary.json").read_text())["test_accuracy"]
        for workdir in (tmp_path, undisturbed)
    ]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_signals_save_and_exit(tmp_path, signum):
    code, log = stop_at(tmp_path, "init round 2 ", signum)
    assert code == 128 + signum
    assert "state saved" in log
    steps = list((tmp_path / "stages" / "init").glob("*/checkpoints/round/[0-9]*"))
    assert steps


def test_a_finished_study_is_only_shown(short):
    workdir, _ = short
    again = run(workdir, *SHORT)
    assert again.returncode == 0
    assert "running" not in again.stderr
    assert again.stderr.count("reused from") == len(list(workdir.glob("stages/*")))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--config.distill.temperature=-1.0"],
            "distill.temperature = -1.0: must be > 0",
        ),
        (["--config.distill.tempreature=1.0"], "did you mean 'distill.temperature'?"),
        (["--config.distill.steps=many"], "many"),
        (["--confg.seed=1"], "confg"),
        (["--config.data.num_clients=5000"], "data.num_clients = 5000"),
        (["--config.model.name=vgg"], "model.name = 'vgg': must be one of resnet18"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, more, expected):
    words = ["--config", str(ROOT / CONFIG), "--workdir", str(tmp_path / "new")]
    assert program.main([*words, *more]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert expected in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_bad_input_ends_the_process_so(tmp_path):
    done = run(tmp_path / "new", "--config.distill.temperature=-1.0")
    assert done.returncode == 2
    assert done.stderr == "error: distill.temperature = -1.0: must be > 0\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/nope.py", "--config = 'configs/nope.py': must be a file"),
        ("configs/cifar10_mosaic.py:nope", "nope: unknown variant; known: default"),
    ],
)
def test_bad_configs(tmp_path, capsys, monkeypatch, config, expected):
    monkeypatch.chdir(ROOT)
    words = ["--config", config, "--workdir", str(tmp_path / "new")]
    assert program.main(words) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.splitlines()) == 1


def test_default_workdir():
    def at(*words):
        return program.default_workdir(program.config_argument(words))

    assert at("--config", "configs/digits_mosaic.py") == "runs/digits_mosaic"
    assert at("--config=configs/a.py:b", "--config.seed=1") == "runs/a_b"


def test_no_data_and_no_network(tmp_path):
    begin = time.monotonic()
    done = run(
        tmp_path / "new",
        f"--config.data.dir={tmp_path}",
        config="configs/cifar10_mosaic.py",
    )
    assert time.monotonic() - begin < 20  # of which half is Python starting
    assert done.returncode == 2
    assert "put the file cifar-10-binary.tar.gz into" in done.stderr


def test_a_workdir_in_use_is_refused(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("123 on host")
        file.flush()
        done = run(tmp_path)
    assert done.returncode == 2
    assert "in use by process 123 on host" in done.stderr
