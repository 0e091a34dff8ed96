"""mosaic sweep: bad input is one line and code 2, before any work."""

import concurrent.futures
import json
import pathlib
import re
import time

import pytest

from mosaic_jax.cli import claims, compared, experiments, launch, sweep
from mosaic_jax.core import errors
from mosaic_jax.report import comparison, runs
from mosaic_jax.run import config_file, settings
from tests import tiny

CONFIG = str(pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny_config.py")


def one_line(capsys, call):
    """The one line that a program which ends with code 2 tells."""
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


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
            "AttributeError: module 'config_file' has no attribute 'get_config'",
        ),
        ("def get_config(): return 1", "AttributeError: 'int' object has no attribute"),
        ("def get_config(): raise KeyError('steps')", "KeyError: 'steps'"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
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


def test_infinity_is_no_privacy_and_nothing_else(tmp_path, capsys):
    """In a grid and as a setting; other fields say what they allow."""
    found = sweep.parse(CONFIG, ["privacy.epsilon=1,inf"], 1, tmp_path)
    assert list(found.cells) == ["privacy.epsilon=1.0", "privacy.epsilon=inf"]
    for cell in found.cells.values():
        cell["prototypes"]["clusters"] = 1
    studies = [settings.from_mapping(cell) for cell in found.cells.values()]
    assert [study.privacy.epsilon for study in studies] == [1.0, 0.0]
    told = one_line(
        capsys, lambda: sweep.main(["--config", CONFIG, "--grid=data.alpha=inf"])
    )
    assert told == "error: data.alpha = inf: must be finite\n"


@pytest.mark.parametrize("inside", ["", "cell"])
def test_a_workdir_that_is_a_file(tmp_path, capsys, inside):
    path = tmp_path / "file"
    path.write_text("x")
    arguments = ["--config", CONFIG, "--workdir", str(path / inside)]
    told = one_line(capsys, lambda: sweep.main(arguments))
    assert told.startswith(f"error: --workdir = {path / inside}")
    assert told.endswith(f": {path} is no folder\n")
    told = one_line(capsys, lambda: launch.run(tiny.config().to_dict(), path / inside))
    assert told.endswith(f": {path} is no folder\n")


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (["seed=1", "seed=2"], "seed: is given twice: must be --grid seed=VALUE,"),
        (["model.start=" + "x" * 260], "a folder's name of 272 bytes: must be at most"),
        (["seeds=1,3"], "--grid = seeds: must be the option --seeds"),
        (["compare=fedavg,mosaic"], "--grid = compare: must be cells of one method"),
        (["data.name=a/b,a_b"], "several cells would have the folder data.name=a_b"),
    ],
)
def test_grids_whose_cells_would_be_lost(tmp_path, capsys, grid, expected):
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "x")]
    arguments += [f"--grid={one}" for one in grid]
    assert expected in one_line(capsys, lambda: sweep.main(arguments))
    assert not (tmp_path / "x").exists()


def test_fields_that_are_the_same_in_all_cells(tmp_path, capsys):
    words = ["--config.data.alpha=2", "--config.model.name=mlp"]
    words += ["--config.data.dir=a,b=c", "--config.model.start="]
    words += ["--config.log.trackers=('wandb',)", "--config.data.in_memory=false"]
    found = sweep.parse(CONFIG, ["seed=1,2"], 1, tmp_path, words)
    assert list(found.cells) == ["seed=1", "seed=2"]
    for cell in found.cells.values():
        assert (cell["data"]["alpha"], cell["model"]["name"]) == (2.0, "mlp")
        assert (cell["data"]["dir"], cell["model"]["start"]) == ("a,b=c", "")
        assert cell["log"]["trackers"] == ("wandb",)
        assert cell["data"]["in_memory"] is False


def test_a_dry_run_tells_what_cells_share_and_leaves_nothing(tmp_path, capsys):
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "x"), "--dry_run"]
    assert sweep.main([*arguments, "--grid=distill.steps=3,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (re.findall(r"\d+", line)[1:] for line in lines[:2])
    assert lines[0].startswith("distill.steps=3: ") and first[1] == "0"
    # The second has distillation and all after it to run.
    assert 0 < int(second[0]) < int(first[0]) == int(second[0]) + int(second[1])
    assert f"to run, {second[1]} of {2 * int(first[0])} shared" in lines[2]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--config.seed=1", "or --config.seed=VALUE"),
        ("--config.data.in_memory", "must be --config.FIELD=VALUE"),
        ("--config.log.trackers=wandb", "must be (VALUE,...), as Python has it"),
        ("--config.seeds=2", "--config = seeds: must be the option --seeds"),
        ("--config.data.alpha=1,2", "--config: data.alpha = '1,2': must be a number"),
        ("--config.data.alhpa=1", "--config: unknown field data.alhpa, "),
        ("--config.data.alpha=x", "--config: data.alpha = 'x': must be a number"),
    ],
)
def test_fields_of_all_cells_that_cannot_be(tmp_path, capsys, word, expected):
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "x")]
    arguments += ["--grid=seed=1,2", word]
    assert expected in one_line(capsys, lambda: sweep.main(arguments))
    assert not (tmp_path / "x").exists()


def test_a_flag_of_a_sweep_that_is_none(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--config", CONFIG, "--gird=seed=1,2"])
    assert "unrecognized arguments: --gird=seed=1,2" in capsys.readouterr().err


@pytest.fixture
def drawn(monkeypatch):
    """Tables over what sweep.json names, drawn slowly; how many were at a time."""
    now, most = [], []

    def write(order, page, title):
        now.append(page)
        most.append(len(now))
        time.sleep(0.2)
        now.pop()
        return {name: {} for name in order}

    def collect(paths):
        return json.loads((paths[0] / "sweep.json").read_text())["order"]

    monkeypatch.setattr(runs, "collect", collect)
    monkeypatch.setattr(comparison, "write", write)
    monkeypatch.setattr(comparison, "table", str)
    return most


def test_a_report_is_of_the_cells_that_have_finished(tmp_path, capsys, drawn):
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "x"), "--report"]
    arguments += ["--grid", "seed=1,2,3"]
    assert "no such folder" in one_line(capsys, lambda: sweep.main(arguments))
    mine = claims.Claims(tmp_path / "x")
    assert "no cell has finished" in one_line(capsys, lambda: sweep.main(arguments))
    mine.settle("seed=1")
    mine.settle("seed=2", "loss is nan")
    ran(sweep.parse(CONFIG, ["seed=1"], 1, tmp_path / "x"))
    assert sweep.main(arguments) == 0 and drawn == [1]
    content = json.loads((tmp_path / "x" / "sweep.json").read_text())
    assert content["order"] == list(content["cells"]) == ["seed=1"]
    assert content["failed"] == {"seed=2": "loss is nan", "seed=3": "not finished yet"}


def ran(cells):
    """As if the cells had been run: their settings stand there."""
    for name, config in cells.cells.items():
        study = settings.from_mapping(config)
        for folder, one in experiments.of_seeds(study, cells.workdir / name).items():
            folder.mkdir(parents=True)
            config_file.write(folder, one, [])
        claims.Claims(cells.workdir).settle(name)


@pytest.mark.parametrize(
    ("changed", "seeds", "expected"),
    [
        ("init.rounds=9", 1, "was run with init.rounds = 7 where this study has 9"),
        ("init.rounds=7", 2, "seed_0: nothing was run there"),
        ("model.dtype=bfloat16", 1, "was run with model.dtype = 'float32' where"),
        ("log.every_steps=3", 1, ""),  # cannot change a result
    ],
)
def test_cells_of_another_sweep_are_not_taken_for_its_own(
    tmp_path, capsys, drawn, changed, seeds, expected
):
    """Two sweeps whose fixed fields differ have cells of the same names."""
    words = ["--config", CONFIG, "--workdir", str(tmp_path), "--grid=data.alpha=1,2"]
    rounds = "--config.init.rounds=7"
    ran(sweep.parse(CONFIG, ["data.alpha=1,2"], 1, tmp_path, [rounds]))
    words += [f"--seeds={seeds}", f"--config.{changed}", "--report"]
    words += [] if changed.startswith("init") else [rounds]
    if expected:
        assert expected in one_line(capsys, lambda: sweep.main(words))
    else:
        assert sweep.main(words) == 0
    assert drawn == ([] if expected else [1])


def test_a_report_may_be_drawn_on_a_machine_of_another_kind(tmp_path, drawn):
    """What "auto" stands for there cannot be what it was where the cells were run."""
    ran(sweep.parse(CONFIG, ["seed=1"], 1, tmp_path, ["--config.model.dtype=bfloat16"]))
    sweep.report(sweep.parse(CONFIG, ["seed=1"], 1, tmp_path))
    assert drawn == [1]


def test_processes_that_end_together_draw_one_report_at_a_time(tmp_path, drawn):
    cells = sweep.parse(CONFIG, [], 1, tmp_path)
    ran(cells)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for one in [pool.submit(sweep.report, cells) for _ in range(3)]:
            one.result()
    assert drawn == [1, 1, 1]


def test_a_cell_that_runs_out_of_memory_stops_no_other(tmp_path, monkeypatch):
    def raises(error):
        def run_all(works, workdir):
            raise error

        monkeypatch.setattr(compared.experiments, "run", run_all)
        return compared.run_sharing({"a": []}, "a", tmp_path)

    assert raises(errors.DivergedError("loss is nan")) == "loss is nan"
    assert raises(MemoryError()).startswith("out of memory: MemoryError")
    full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert raises(full).startswith("RESOURCE_EXHAUSTED: Out of memory: lower model")
    for own in (OSError("No space left on device"), RuntimeError("x"), KeyError("x")):
        with pytest.raises(type(own)):
            raises(own)
