"""The package as others have it: installed from a wheel, outside of the clone."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import numpy as np
import pytest

import mosaic_jax
from tests import badges, launched, requirements

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "outside_package"
# Fields by which the demo takes seconds; a whole chain is run further down.
BRIEF = {
    "method": "federated",
    "data.num_clients": 2,
    "model.width": 2,
    "local.steps": 1,
    "init.rounds": 2,
    "log.trackers": (),
}


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    building = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    pip("wheel", *building, str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder for packages that has the wheel."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def run(*words, cwd, site=""):
    """The console in `site`, or another program, without anything of this process."""
    fields = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "JAX_"))
    }
    fields["XLA_FLAGS"] = launched.flags_of_one_device()
    fields["XDG_CACHE_HOME"] = str(ROOT / ".pytest_cache")
    fields["PYTHONPATH"] = str(site)
    return subprocess.run(
        words, cwd=cwd, env=fields, capture_output=True, text=True, timeout=600
    )


# What code outside may rely on.
PUBLIC = (
    "Algorithm Arrays Callback Comparison Context EarlyStopping Experiment Model"
    " Outcome Result Round ServerTraining Settings Stage Study Summary"
    " compare configs data from_mapping load metrics"
)


# --- what is declared


def test_requirements_files_are_made_from_the_project():
    for name, content in requirements.files().items():
        assert (ROOT / name).read_text() == content, "make requirements writes them"


def test_badges_are_true():
    for name, content in badges.files().items():
        assert (badges.FOLDER / name).read_text() == content, "make badges draws them"
        assert f"docs/badges/{name}" in (ROOT / "README.md").read_text()


def test_there_is_one_version():
    version = mosaic_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_are_those_that_a_type_checker_sees():
    tree = ast.parse((ROOT / "mosaic_jax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module.removeprefix("mosaic_jax.")
        for node in block.body
        for alias in node.names
    }
    modules = {
        name: f"{seen.pop(name)}.{name}".removeprefix("mosaic_jax.")
        for name in mosaic_jax._MODULES
    }
    assert seen == mosaic_jax._HOMES and modules == mosaic_jax._MODULES
    assert sorted([*seen, *modules]) == sorted(PUBLIC.split())
    for name in PUBLIC.split():
        found = getattr(mosaic_jax, name).__name__
        assert found.rpartition(".")[2] == name
        assert name in dir(mosaic_jax)
    with pytest.raises(AttributeError, match="no attribute 'Studdy'"):
        mosaic_jax.Studdy  # noqa: B018


IMPORTED = """
import sys, mosaic_jax
assert mosaic_jax.__version__
slow = {"jax", "flax", "numpy", "tensorflow"} & sys.modules.keys()
assert not slow, slow
mosaic_jax.Experiment
assert "tensorflow" not in sys.modules
"""


def test_the_import_loads_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0


# --- what is installed


def test_the_wheel_has_the_library_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mosaic_jax").rglob("*")
        if path.suffix in (".py", ".css", ".html", ".js", ".typed")
    }
    configs = {f"mosaic_jax/{p.relative_to(ROOT)}" for p in ROOT.glob("configs/*.py")}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == tracked | configs
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    metadata = next(name for name in about if name.endswith("METADATA"))
    told = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {mosaic_jax.__version__}\n" in told
    assert "\nLicense-Expression: Apache-2.0\n" in told
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = told.count("\nRequires-Dist: ") - told.count("; extra == ")
    assert needed == len(project["dependencies"])


def test_the_console_outside_of_the_clone(site, tmp_path):
    done = run(site / "bin" / "mosaic", "--version", cwd=tmp_path, site=site)
    assert done.stdout == f"{mosaic_jax.__version__}\n"
    done = run(sys.executable, "-m", "mosaic_jax", "list", cwd=tmp_path, site=site)
    for name in ("digits_mosaic", "baselines", "resnet18", "fedavg", "food101"):
        assert f"\n  {name} " in done.stdout
    done = run(
        site / "bin" / "mosaic", "run", "--config", "nowhere", cwd=tmp_path, site=site
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: --config = 'nowhere': must be a file, such as"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_outside_of_the_clone(site, tmp_path):
    fields = [f"--config.{name}={value}" for name, value in BRIEF.items()]
    words = ["run", "--config=digits_mosaic", *fields]
    done = run(site / "bin" / "mosaic", *words, cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "runs" / "digits_mosaic"
    assert "</style>" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "config.json").read_text())["command"][1] == "run"


@pytest.mark.slow
def test_parts_from_a_folder_outside_of_the_package(site, tmp_path):
    """A study of an algorithm, network, data set, stage, server method and loss."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "outside_package")
    command = next(
        line.split()
        for line in (EXAMPLE / "README.md").read_text().splitlines()
        if line.startswith("mosaic run") and "compare" in line
    )
    done = run(site / "bin" / "mosaic", *command[1:], cwd=folder, site=site)
    assert done.returncode == 0, done.stderr
    workdir = folder / "runs" / "my_config"
    found = {
        name: json.loads((workdir / name / "summary.json").read_text())
        for name in ("mosaic", "my_server_method:MeanLogits")
    }
    for summary in found.values():
        assert summary["dataset"] == "my_data:stripes"
        number = summary["headline"]["overconfidence"]
        assert number["low"] < number["mean"] < number["high"]
        assert all(np.isfinite(list(summary["test_accuracy"].values())))
    assert found["mosaic"]["test_accuracy"]["final"] > 0.4  # four classes
    assert "Confidence" in (workdir / "mosaic" / "report.html").read_text()
    record = next(workdir.glob("my_server*/stages/init/*/done.json")).read_text()
    assert "student_loss" in record


@pytest.mark.slow
def test_a_study_from_python_outside_of_the_package(site, tmp_path):
    """Every part as an object; nothing runs twice but where an algorithm changed."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "outside_package")

    def study():
        done = run(sys.executable, "my_study.py", cwd=folder, site=site)
        assert done.returncode == 0, done.stderr
        *rounds, metrics, classes, page = done.stdout.splitlines()
        assert "</style>" in (folder / page).read_text()
        return rounds, metrics, classes

    rounds, *first = study()
    assert 2 < len(rounds) < 10  # the callback ended it
    assert study() == ([], *first)
    path = folder / "my_algorithm.py"
    path.write_text(path.read_text().replace("self.momentum * last", "0.0 * last"))
    again, *other = study()
    assert again and other != first


def test_an_editable_install(tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    # Its folders for packages, where hatchling is; a clone in one does not show.
    (packages / "here.pth").write_text("\n".join(p for p in sys.path if "-pack" in p))
    words = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    pip("--python", str(python), "install", *words, "--editable", str(ROOT))
    code = "from mosaic_jax.configs import base; print(base.__file__)"
    done = run(str(python), "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(ROOT / "configs" / "base.py"), done.stderr
