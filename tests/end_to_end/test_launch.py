"""The command line: errors, kills, signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import launch as start
from mosaic_jax import experiment, trees
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/end_to_end/tiny_config.py"
# A word of the log that shows the stage at work, in order of the stages.
MOMENTS = [
    "init round 2 ",
    "generators gan 2 ",
    "warmup: running",
    "experts local 2 ",
    "prototypes: running",
    "meta head 2 ",
    "distill student 4 ",
    "finetune round 2 ",
]


def command(workdir, *more, config=CONFIG):
    return [
        sys.executable,
        "launch.py",
        "--config",
        config,
        "--workdir",
        workdir,
        *more,
    ]


def environment():
    cache = ROOT / ".pytest_cache" / "xla"
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }


def run(workdir, *more, config=CONFIG, **options):
    return subprocess.run(
        command(workdir, *more, config=config),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def stop_at(workdir, moment, signum):
    """Start, send `signum` when the log shows `moment`; exit code and the log."""
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = []
    with process:
        for line in process.stderr:
            log.append(line)
            if moment in line:
                process.send_signal(signum)
                moment = "\0"
    return process.returncode, "".join(log)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def final_model(workdir):
    study = experiment.Experiment(tiny.study(warmup__rounds=2), workdir)
    return study.finished()[-1].artifacts()["final_model"]


def test_output_ends_with_table_and_paths(undisturbed):
    workdir, done = undisturbed
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["accuracy", "test", "validation"]
    assert lines[-2] == f"summary  {workdir / 'summary.json'}"
    assert lines[-1] == f"report   {workdir / 'report.html'}"
    assert (workdir / "report.html").exists()
    # Silent bars: the log is lines of text.
    assert "\r" not in done.stderr


def test_killed_in_every_stage_and_resumed(undisturbed, tmp_path):
    for moment in MOMENTS:
        code, log = stop_at(tmp_path, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, log
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert trees.digest(final_model(tmp_path)) == trees.digest(
        final_model(undisturbed[0])
    )
    summaries = [
        json.loads((workdir / "summary.json").read_text())["test_accuracy"]
        for workdir in (tmp_path, undisturbed[0])
    ]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_exit(tmp_path, signum):
    code, log = stop_at(tmp_path, "init round 2 ", signum)
    assert code == 128 + signum
    assert "state saved" in log
    steps = list((tmp_path / "stages" / "init").glob("*/checkpoints/round/[0-9]*"))
    assert steps


def test_a_finished_study_is_only_shown(undisturbed):
    workdir, _ = undisturbed
    again = run(workdir)
    assert again.returncode == 0
    assert "running" not in again.stderr
    assert again.stderr.count("reused from") == len(MOMENTS)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--config.distill.temperature=-1.0"],
            "distill.temperature = -1.0: must be > 0",
        ),
        (["--config.distill.tempreature=1.0"], 'Did you mean "temperature"'),
        (["--config.distill.steps=many"], "many"),
        (["--confg.seed=1"], "confg"),
        (["--config.data.num_clients=5000"], "data.num_clients = 5000"),
        (["--config.model.name=vgg"], "model.name = 'vgg': must be one of resnet18"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, more, expected):
    done = run(tmp_path / "new", *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/nope.py", "--config = 'configs/nope.py': must be a file"),
        ("configs/cifar10_mosaic.py:nope", "nope: unknown variant; known: default"),
    ],
)
def test_bad_configs(tmp_path, config, expected):
    done = run(tmp_path / "new", config=config)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_default_workdir():
    def at(*words):
        return start.default_workdir(start.config_argument(["launch.py", *words]))

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
    import fcntl

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("123 on host")
        file.flush()
        done = run(tmp_path)
    assert done.returncode == 2
    assert "in use by process 123 on host" in done.stderr
