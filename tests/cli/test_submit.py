"""mosaic submit: what sbatch gets, and what becomes of a job that is told to stop."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mosaic_jax.cli import submit
from mosaic_jax.core import errors

pytest.importorskip("submitit")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"{ROOT}/tests/end_to_end/tiny_config.py:once"

# Programs of Slurm, as far as submitit calls them. sbatch keeps what it is given.
PROGRAMS = {
    "sbatch": """
        import os, pathlib, shutil, sys
        jobs = pathlib.Path(os.environ["JOBS"])
        number = 40 + len(list(jobs.glob("*.sh")))
        shutil.copy(sys.argv[1], jobs / f"{number}.sh")
        print(f"Submitted batch job {number}")
    """,
    "srun": """
        import os, pathlib, sys
        words, job = sys.argv[2:], os.environ["SLURM_JOB_ID"]
        for stream in (1, 2):  # --output FILE --error FILE
            path = words[1].replace("%j", job).replace("%t", "0")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            words = words[2:]
        (pathlib.Path(os.environ["JOBS"]) / "pid").write_text(str(os.getpid()))
        os.execvp(words[0], words)
    """,
    "scontrol": """
        import os, pathlib, sys
        (pathlib.Path(os.environ["JOBS"]) / "requeued").write_text(sys.argv[2])
    """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that keeps jobs; the folder of what sbatch was given."""
    programs, jobs = tmp_path / "bin", tmp_path / "given"
    programs.mkdir()
    jobs.mkdir()
    for name, text in PROGRAMS.items():
        path = programs / name
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.chdir(ROOT)
    return jobs


@pytest.fixture
def start(slurm):
    """A function that has a job begin to run, as on a node."""
    started = []

    def run(number):
        one = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NUM_NODES": "1"}
        command = ["bash", str(slurm / f"{number}.sh")]
        started.append(
            subprocess.Popen(command, env=os.environ | one, start_new_session=True)
        )
        return started[-1]

    yield run
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def directives(path):
    """The options of a batch file by name."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", path.read_text(), re.M))


def test_cells_are_arrays_that_wait_for_what_they_share(slurm, tmp_path, capsys):
    words = ["sweep", "--config", CONFIG, "--workdir", str(tmp_path / "runs")]
    words += ["--grid", "warmup.rounds=1,2", "--grid", "data.alpha=0.5,1.0"]
    given = ["--job", "timeout_min=30", "--job", "slurm_partition=gpu"]
    assert submit.main([*given, *words]) == 0
    files = [slurm / f"{number}.sh" for number in (40, 41, 42)]
    assert sorted(slurm.glob("*.sh")) == files
    first, second, report = map(directives, files)
    assert first["array"] == second["array"] == "0-1%2" and "array" not in report
    assert "dependency" not in first
    assert second["dependency"] == "afterany:40"
    assert report["dependency"] == "afterany:41"
    for found in (first, second, report):
        assert (found["time"], found["partition"]) == ("30", "gpu")
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "job 40: 2 at a time"
    assert not list((tmp_path / "runs").glob("*/stages"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--job", "timeout", "run"], "--job = 'timeout': must be NAME=VALUE, such"),
        (["--job", "minutes=3", "run"], "--job: Parameter 'minutes' need to be pref"),
        (["--job", "timeout_min=a", "run"], '--job: Parameter "timeout_min" expected'),
        (["run", "--config.distill.steps=-1"], "distill.steps = -1: must be"),
        (["sweep", "--cell=0"], "mosaic submit sweep: must be without --cell"),
        (["sweep", "--grid=a=1"], "--grid: unknown field a"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_submitted(
    slurm, tmp_path, capsys, words, expected
):
    where = ["--config", CONFIG, "--workdir", str(tmp_path / "runs")]
    at = words.index("run" if "run" in words else "sweep") + 1
    assert submit.main([*words[:at], *where, *words[at:]]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {expected}") and told.count("\n") == 1, told
    assert not list(slurm.glob("*.sh"))


def test_a_machine_without_slurm_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    words = ["run", "--config", CONFIG, "--workdir", str(tmp_path)]
    assert submit.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: mosaic submit: ") and "srun" in told
    assert told.count("\n") == 1


def test_parameters_are_literals_or_words():
    assert submit.parse_parameter("nodes=2") == ("nodes", 2)
    assert submit.parse_parameter("slurm_partition=a=b") == ("slurm_partition", "a=b")
    setup = submit.parse_parameter("slurm_setup=['module load cuda']")
    assert setup == ("slurm_setup", ["module load cuda"])
    with pytest.raises(errors.ConfigError, match="must be NAME=VALUE"):
        submit.parse_parameter("=3")


def test_a_command_that_fails_is_a_job_that_fails():
    submit.Job([sys.executable, "-c", ""])()
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        submit.Job([sys.executable, "-c", "raise SystemExit(3)"])()


@pytest.mark.slow
def test_a_job_out_of_time_saves_its_state_and_goes_on(slurm, start, tmp_path):
    workdir = tmp_path / "runs"
    words = ["run", "--config", CONFIG, "--workdir", str(workdir)]
    words += ["--config.finetune.rounds=100000", "--config.log.checkpoint_seconds=1e6"]
    assert submit.main(["--job", "timeout_min=60", *words]) == 0
    job = start(40)
    saved = workdir / "stages" / "finetune"
    while not list(saved.glob("*/checkpoints")):
        assert job.poll() is None
        time.sleep(0.1)
    os.kill(int((slurm / "pid").read_text()), signal.SIGUSR2)
    job.wait(60)
    assert (slurm / "requeued").read_text() == "40"
    assert json.loads((workdir / "progress.json").read_text())["state"] == "interrupted"
    steps = [int(path.name) for path in saved.glob("*/checkpoints/*/[0-9]*")]
    assert max(steps) > 0
    # Queued again: it goes on from there.
    job = start(40)
    log = workdir / "jobs" / "40" / "40_0_log.err"
    while f"resuming at step {max(steps)}" not in log.read_text():
        assert job.poll() is None
        time.sleep(0.1)
    os.kill(int((slurm / "pid").read_text()), signal.SIGUSR2)
    job.wait(60)


@pytest.mark.slow
def test_jobs_of_a_sweep_leave_its_table(slurm, start, tmp_path):
    workdir = tmp_path / "runs"
    words = ["sweep", "--config", CONFIG, "--workdir", str(workdir)]
    assert submit.main([*words, "--grid", "warmup.rounds=1,2"]) == 0
    for number in (40, 41, 42):
        assert start(number).wait(180) == 0
    assert len(json.loads((workdir / "sweep.json").read_text())["cells"]) == 2
