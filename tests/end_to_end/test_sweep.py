"""A grid over a tiny study: what is shared, resumed, submitted, refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from mosaic_jax.cli import config_files, grids, sweep
from mosaic_jax.core import errors
from mosaic_jax.run import runner
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = f"{ROOT}/tests/end_to_end/tiny_config.py:once"
GRID = ["--grid", "warmup.rounds=1,2", "--grid", "finetune.rounds=1,2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    arguments = ["--config", CONFIG, *GRID, "--workdir", str(workdir)]
    assert sweep.main(arguments) == 0
    return workdir, arguments


def computed(workdir):
    """Directories of stages that some study computed, not copied."""
    return sorted(workdir.glob("*/stages/*/*/done.json"))


def test_common_stages_are_computed_once(swept):
    workdir, _ = swept
    content = json.loads((workdir / "sweep.json").read_text())
    assert content["order"] == [
        f"warmup.rounds={number},finetune.rounds={rounds}"
        for number in (1, 2)
        for rounds in (1, 2)
    ]
    starts = {
        path.parts[-2]: set() for path in computed(workdir) if path.parts[-3] == "init"
    }
    assert len(starts) == 1
    trained = {p.parts[-2] for p in computed(workdir) if p.parts[-3] == "server"}
    assert len(trained) == 2
    page = (workdir / "sweep.html").read_text()
    assert "finetune.rounds" in page
    assert all(name in page for name in content["order"])


def test_counts_of_shared_stages(swept, tmp_path):
    _, arguments = swept
    config = config_files.load(CONFIG).to_dict()
    grid = [grids.swept(one, config) for one in arguments[3:6:2]]
    fresh = sweep.build(config, grid, 1, tmp_path)
    # Four stages; then finetune alone; then all but the first; then finetune.
    counts = list(sweep.shared(fresh.studies()).values())
    assert counts == [(4, 0), (1, 3), (3, 1), (1, 3)]


def test_again_computes_nothing(swept, capsys):
    workdir, arguments = swept
    before = [path.stat().st_mtime_ns for path in computed(workdir)]
    assert sweep.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in computed(workdir)] == before
    assert "stages: 0 computed, 16 of 16 shared" in capsys.readouterr().out


def test_a_cell_that_diverges_stops_no_other(swept, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(swept[0], tmp_path / "sweep")
    arguments = [*swept[1][:-1], str(workdir)]
    (bad,) = workdir.glob("warmup.rounds=1,finetune.rounds=2")
    shutil.rmtree(bad)
    together = runner.run_together

    def diverges(works):
        if works[0].workdir == bad:
            raise errors.DivergedError("finetune: loss is nan")
        return together(works)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_together", diverges)
        assert sweep.main(arguments) == 3
    found = capsys.readouterr()
    assert found.err.endswith(f"error: {bad.name}: finetune: loss is nan\n")
    assert f"{bad.name}: came to no end: finetune: loss is nan" in found.out
    content = json.loads((workdir / "sweep.json").read_text())
    assert content["failed"] == {bad.name: "finetune: loss is nan"}
    assert len(content["cells"]) == 3 and bad.name not in content["cells"]
    # The same command tries it again.
    assert sweep.main(arguments) == 0
    content = json.loads((workdir / "sweep.json").read_text())
    assert len(content["cells"]) == 4 and not content["failed"]


@pytest.mark.slow
def test_three_processes_share_a_sweep_and_one_is_killed(tmp_path):
    grid = ["--grid", "warmup.rounds=1,2,3", "--grid", "finetune.rounds=1,2,3,4"]
    command = [sys.executable, "-m", "mosaic_jax", "sweep", "--config", CONFIG, *grid]
    command += ["--workdir", str(tmp_path)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    killed = workers.pop()
    assert "stages to run" in killed.stdout.readline()
    killed.kill()
    killed.wait()
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    started = [
        line.partition(":")[0]
        for output in outputs
        for line in output.splitlines()
        if "stages to run" in line
    ]
    assert len(started) == len(set(started)) == 12
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert len(content["cells"]) == 12 and not content["failed"]


def test_cells_that_share_wait_for_each_other(tmp_path):
    config = config_files.load(CONFIG).to_dict()
    grid = [("warmup.rounds", [1, 2]), ("data.alpha", [0.5, 1.0])]
    waves = sweep.waves(sweep.build(config, grid, 1, tmp_path).studies())
    assert waves == [
        ["warmup.rounds=1,data.alpha=0.5", "warmup.rounds=1,data.alpha=1.0"],
        ["warmup.rounds=2,data.alpha=0.5", "warmup.rounds=2,data.alpha=1.0"],
    ]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("distil.steps=1", "--grid: unknown field distil.steps, did you mean"),
        ("distill=1", "--grid = distill: must be a field, not a group"),
        ("distill.steps", "--grid = 'distill.steps': must be FIELD=VALUE,VALUE,..."),
        ("distill.steps=a", "--grid: distill.steps = 'a': must be a whole number"),
        ("distill.steps=1.5", "--grid: distill.steps = '1.5': must be a whole number"),
        ("distill.balanced=1", "--grid: distill.balanced = '1': must be true or false"),
    ],
)
def test_wrong_grids_are_one_line(grid, expected, capsys, tmp_path):
    arguments = ["--config", CONFIG, "--grid", grid, "--workdir", str(tmp_path / "x")]
    assert sweep.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_wrong_value_in_any_cell_ends_before_work(capsys, tmp_path):
    arguments = ["--config", CONFIG, "--grid", "distill.steps=2,-1"]
    assert sweep.main([*arguments, "--workdir", str(tmp_path / "x")]) == 2
    assert "distill.steps = -1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_values_take_the_type_of_the_field():
    config = tiny.config().to_dict()
    assert grids.swept("data.alpha=1,0.5", config) == ("data.alpha", [1.0, 0.5])
    assert grids.swept("distill.balanced=true", config)[1] == [True]
    assert grids.swept("meta.head=linear,mean", config)[1] == ["linear", "mean"]
    rates = grids.swept("budgets.rates=(1,0.5),(1,0.25)", config)[1]
    assert rates == [(1, 0.5), (1, 0.25)]


def test_no_such_config():
    with pytest.raises(errors.ConfigError, match="must be a file"):
        config_files.load("configs/none.py")
