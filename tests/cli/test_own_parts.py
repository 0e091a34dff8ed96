"""Fields of a user's own components on the command line and in sweeps."""

import os
import pathlib
import subprocess
import sys

import pytest

from mosaic_jax.cli import compared, config_files, costs, main, run, sweep
from mosaic_jax.core import errors
from mosaic_jax.run import settings
from mosaic_jax.run import study as studies

CONFIG = str(pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny_config.py")
OWN = "tests.own_parts"
# One of each kind, with one field.
NAMING = [
    ("init.method", f"{OWN}:Doubled", "Doubled.factor", 3.0),
    ("server.method", f"{OWN}:Shrink", "Shrink.by", 0.25),
    ("aggregation.rule", f"{OWN}:Largest", "Largest.times", 2.0),
    ("attack.name", f"{OWN}:Silence", "Silence.times", 0.5),
    ("compression.name", f"{OWN}:Halves", "Halves.times", 2.0),
    ("stages", f"('{OWN}:Halfway',)", "Halfway.weight", 0.75),
    ("compare", f"fedavg,{OWN}:Shrink", "Shrink.by", 0.25),
    ("compare", f"mosaic+{OWN}:Doubled,fedavg", "Doubled.factor", 3.0),
]


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """The console changes where modules are looked for; this process keeps its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def value(config, field):
    group, name = field.split(".")
    return config["methods"][group][name]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("naming", "path", "field", "number"), NAMING)
def test_fields_on_the_command_line(naming, path, field, number, together):
    flag = f"--config.{naming}"
    named = [f"{flag}={path}"] if together else [flag, path]
    words = ["--config", CONFIG, f"--config.methods.{field}={number}", *named]
    if naming == "server.method":
        words.append("--config.method=federated")
    given = run.parse(words)
    assert value(given.config.to_dict(), field) == number
    study = settings.from_mapping(given.config.to_dict())
    for name in study.compare.split(",") if study.compare else ():
        studies.build(compared.study_of_method(study, name))
    if not study.compare:
        studies.build(study)


def test_fields_that_the_file_sets(tmp_path):
    """They keep their values; of those that it leaves out the defaults are added."""
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        "from tests import tiny\n"
        "def get_config():\n"
        f"    config = tiny.config(init__method='{OWN}:Doubled')\n"
        f"    config.stages = ('{OWN}:Halfway',)\n"
        "    config.methods.Doubled = config_dict.ConfigDict({'factor': 3})\n"
        "    return config\n"
    )
    given = run.parse(["--config", str(path), "--config.methods.Halfway.weight=0.1"])
    assert value(given.config.to_dict(), "Doubled.factor") == 3.0
    assert value(given.config.to_dict(), "Halfway.weight") == 0.1
    # An algorithm that the command line replaces is not unknown to the study.
    given = run.parse(["--config", str(path), "--config.init.method=fedavg"])
    assert "Doubled" not in given.config.methods
    studies.build(settings.from_mapping(given.config.to_dict()))


def test_the_example_is_compared_with_methods_of_the_library():
    """Its own algorithm's fields are not unknown to FedAvg."""
    path = pathlib.Path(__file__).parents[2] / "examples/outside_package/my_config.py"
    compare = "--config.compare=mosaic,fedavg,my_server_method:MeanLogits"
    words = ["--config", str(path), compare, "--config.methods.MeanLogits.images=8"]
    study = settings.from_mapping(run.parse(words).config.to_dict())
    mosaic, fedavg, own = (
        studies.build(compared.study_of_method(study, name))
        for name in study.compare.split(",")
    )
    assert mosaic.algorithm.momentum == own.algorithm.momentum == 0.3
    assert own.server.images == 8
    assert not {"ServerMomentum", "MeanLogits"} & fedavg.settings.methods.keys()


def test_fields_in_a_grid(tmp_path):
    grid = [f"init.method=fedavg,{OWN}:Doubled", "methods.Doubled.factor=3,4"]
    found = sweep.parse(CONFIG, grid, 1, tmp_path / "x").studies()
    factors = [
        getattr(works[0].study.algorithm, "factor", None) for works in found.values()
    ]
    assert factors == [None, None, 3.0, 4.0]


def test_what_is_wrong_is_one_line(tmp_path):
    def told(*words):
        with pytest.raises(errors.ConfigError) as caught:
            run.parse(["--config", CONFIG, *words])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    named = f"--config.init.method={OWN}:Doubled"
    assert "factr" in told(named, "--config.methods.Doubled.factr=1.0")
    assert "many" in told(named, "--config.methods.Doubled.factor=many")
    assert "Doubled" in told("--config.methods.Doubled.factor=1.0")
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import config_dict\n"
        "from tests import tiny\n"
        "def get_config():\n"
        f"    config = tiny.config(init__method='{OWN}:Doubled')\n"
        "    config.methods.Doubled = config_dict.ConfigDict({'factor': 'x'})\n"
        "    return config\n"
    )
    with pytest.raises(errors.ConfigError, match="config.methods.Doubled: .*'factor'"):
        run.parse(["--config", str(path)])
    lost = told("--config.init.method=nowhere_at_all:Doubled")
    assert lost.startswith("init.method = 'nowhere_at_all:Doubled': cannot be imported")


def test_a_config_works_from_every_folder(tmp_path, monkeypatch):
    """Modules beside it are found."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "beside_it.py").write_text(f"from {OWN} import Doubled\nFACTOR = 5.0\n")
    (folder / "own.py").write_text(
        "import beside_it\n"
        "from ml_collections import config_dict\n"
        "from tests import tiny\n"
        "def get_config():\n"
        "    config = tiny.config(init__method='beside_it:Doubled')\n"
        "    fields = {'factor': beside_it.FACTOR}\n"
        "    config.methods.Doubled = config_dict.ConfigDict(fields)\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    config = config_files.load("study/own.py")
    sys.modules.pop("beside_it")
    assert studies.build(settings.from_mapping(config.to_dict())).algorithm.factor == 5
    sys.modules.pop("beside_it")


@pytest.mark.parametrize("start", ["", "here", "missing"])
def test_modules_are_found_in_one_order(start, tmp_path, monkeypatch):
    """`python -m` has the current folder first, `mosaic` does not have it."""
    monkeypatch.chdir(tmp_path)
    first = {"": [""], "here": [str(tmp_path)], "missing": []}[start]
    monkeypatch.setattr(sys, "path", [*first, "installed"])
    assert main.main(["--version"]) == 0
    assert sys.path == ["installed", str(tmp_path)]


def test_an_installed_module_comes_first_however_it_is_started(tmp_path):
    """A folder's `numpy.py` does not take the place of NumPy."""
    (tmp_path / "numpy.py").write_text("raise SystemExit(7)\n")
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "mosaic_jax", "list", "configs"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_checks_every_study_before_the_first(tmp_path, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(costs.estimate, "estimate", tried.append)
    monkeypatch.setattr(costs.forecast, "forecast", lambda *_: tried.append(1))
    words = ["--config", CONFIG, "--config.compare=mosaic,fedavg,nothing"]
    words += ["--workdir", str(tmp_path / "x")]
    for flag in ("--dry_run", "--dry_run=measure"):
        assert run.main([*words, flag]) == 2
    assert "nothing" in capsys.readouterr().err
    assert tried == []
