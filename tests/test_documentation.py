"""Every command in the README and the docs is one that its program takes."""

import contextlib
import dataclasses
import importlib
import operator
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import mosaic_jax
from mosaic_jax.cli import main, submit, sweep
from mosaic_jax.cli import run as program
from mosaic_jax.core import prng
from mosaic_jax.data import sources
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.run import methods, settings, study
from mosaic_jax.run.runner import Experiment
from mosaic_jax.server.base import ServerTraining
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "outside_package"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    EXAMPLE / "README.md",
]


def blocks(page):
    """Commands of each fenced block that has any, without comments."""
    for text in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
        lines = text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines if line.strip()]
        commands = [words for words in found if words and words[0] in KNOWN]
        if commands:
            yield commands


KNOWN = ("python", "mosaic", "pip", "make")
COMMANDS = [
    pytest.param(words, id=" ".join(words))
    for page in PAGES
    for block in blocks(page)
    for words in block
]


def test_there_are_commands():
    assert len(COMMANDS) > 15


# The parts that commands name as a user's own, in "my_file".
OWN = """
import dataclasses
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.stages.base import Stage

@dataclasses.dataclass(frozen=True)
class MyFed(Algorithm):
    alpha: float = 1.0

@dataclasses.dataclass(frozen=True)
class MyStage(Stage):
    name = "mine"
    after = "init"
    images: int = 100

    def run(self, context):
        yield from ()
"""


@contextlib.contextmanager
def user_modules(folder, monkeypatch, modules):
    """Modules of these names and code can be imported."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def my_file(tmp_path, monkeypatch):
    """The user's own parts can be imported."""
    with user_modules(tmp_path, monkeypatch, {"my_file": OWN}):
        yield


@pytest.mark.usefixtures("my_file")
@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_taken(words, tmp_path, monkeypatch):
    # Where commands are typed: the example's, where it lies.
    monkeypatch.chdir(EXAMPLE if "my_config.py" in words else ROOT)
    if words[0] == "make":
        assert f"{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[1] == "my_study.py":  # tests/test_package.py runs it
        assert (EXAMPLE / words[1]).is_file()
    elif words[0] == "pip":
        for word in words[2:]:
            known = word.startswith("-") or "[" in word or word == "."
            assert known or (ROOT / word).is_file()
    else:
        takes_program(*program_of(words), tmp_path)


def program_of(words):
    """The module that a command starts, and what it is given."""
    if words[:3] == ["python", "-m", "mosaic_jax"]:
        words = ["mosaic", *words[3:]]
    if words[0] == "mosaic":
        assert words[1] in main.COMMANDS
        return f"mosaic_jax.cli.{words[1]}", words[2:]
    if words[1] == "launch.py":
        return "mosaic_jax.cli.run", words[2:]
    assert words[1] == "-m"
    return words[2], words[3:]


def takes_program(module, words, tmp_path):
    if module == "mosaic_jax.cli.run":
        takes_settings(words)
    elif module == "mosaic_jax.cli.submit":
        args = submit.parser().parse_args(words)
        assert dict(map(submit.parse_parameter, args.job))
        takes_program(f"mosaic_jax.cli.{args.command}", args.words, tmp_path)
    elif module == "mosaic_jax.cli.sweep":
        takes_sweep(words, tmp_path)
    elif module != "pytest":
        takes_flags(module, words)


def takes_settings(words):
    """The flags parse and the settings are valid."""
    found = program.parse(words)
    mapping = found.config.to_dict()
    assert isinstance(settings.from_mapping(mapping), settings.Settings)
    assert program.config_argument(words)


def takes_sweep(words, tmp_path):
    """Every cell's settings are valid."""
    grid = [words[i + 1] for i, word in enumerate(words) if word == "--grid"]
    config = words[words.index("--config") + 1]
    fixed = [word for word in words if word.startswith("--config.")]
    for cell in sweep.parse(config, grid, 1, tmp_path, fixed).cells.values():
        settings.from_mapping(cell)


def takes_flags(module, words):
    """The module's parser has each flag that the command has."""
    if module == "mosaic_jax.cli.data":
        assert words[0] in sources.SOURCES
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    for word in words:
        if word.startswith("-"):
            assert f'"{word.partition("=")[0]}"' in path.read_text(), word


def test_modules_that_commands_name_exist():
    for page in PAGES:
        for name in re.findall(r"python -m (mosaic_jax[\w.]*)", page.read_text()):
            assert importlib.util.find_spec(name), (page, name)


DOCUMENT = ROOT / "docs" / "adding_a_method.md"


@pytest.mark.parametrize("base", [Algorithm, ServerTraining])
def test_every_hook_is_documented(base):
    hooks = {
        name
        for one in base.__mro__[:-1]
        for name in vars(one)
        if not name.startswith("_")
    }
    assert len(hooks) >= 4
    named = set(re.findall(r"`(?:\w+\.)?(\w+)", DOCUMENT.read_text()))
    assert hooks - named == set()


@pytest.fixture
def document(tmp_path, monkeypatch):
    """The document's code, in a file as a user would write it."""
    codes = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    modules = {}
    for code in codes:
        (name,) = re.findall(r"\nclass (\w+)\(", code)
        modules[f"{name.lower()}_of_the_document"] = code
    with user_modules(tmp_path, monkeypatch, modules):
        yield


@pytest.fixture
def noise(document):
    """Import path of the server method in the document."""
    return "noise_of_the_document:Noise"


@pytest.mark.slow
def test_the_stage_in_the_document_runs(document, tmp_path):
    config = tiny.config(stages=("classshares_of_the_document:ClassShares",)).to_dict()
    config["methods"]["ClassShares"] = {"images": 20}
    work = Experiment(settings.from_mapping(config), tmp_path / "run")
    work.run()
    (found,) = (one for one in work.finished() if one.name == "class_shares")
    assert np.isclose(sum(found.record.results["class_share"]), 1)
    templates = [
        work.study.template(link)
        for link in work.study.chain
        if link.name == "class_shares"
    ]
    share = found.artifacts(templates[0])["class_share"]
    assert share.shape == (10,) and np.isclose(share.sum(), 1)


@pytest.mark.usefixtures("document")
def test_the_compressor_in_the_document_sends_half():
    path = "half_of_the_document:Half"
    fields = {"method": "federated", "compression__name": path}
    found = study.build(tiny.study(**fields)).sending.compressor
    array = np.float32([0.1, -2.5, 7.0])
    message = found.encode(array, prng.root(0))
    assert message.nbytes == array.nbytes / 2
    np.testing.assert_allclose(found.decode(message, 3), array, rtol=1e-3)


@pytest.mark.parametrize("when", ["once", "every_round"])
@pytest.mark.slow
def test_the_method_in_the_document_runs(noise, when, tmp_path):
    config = tiny.config(
        init__rounds=1, evaluation__every=1, finetune__rounds=0, server__rounds=2
    ).to_dict()
    config["methods"]["Noise"] = {"images": 8, "learning_rate": 0.01}
    study = methods.with_method(settings.from_mapping(config), noise)
    study = dataclasses.replace(
        study, server=dataclasses.replace(study.server, when=when)
    )
    work = Experiment(study, tmp_path / when)
    summary = work.run()
    assert np.isfinite(summary.test_accuracy["final"])
    of_training = {"once": "server", "every_round": "init"}[when]
    none = dataclasses.replace(study.server, method="none")
    without = dataclasses.replace(study, server=none, methods={})
    plain = Experiment(without, tmp_path / "plain").study.flops
    assert summary.flops[of_training] > plain.get(of_training, 0)


def write_images(root):
    """Three classes of 60 PNGs."""
    np_rng = np.random.RandomState(0)
    for k, name in enumerate(("ants", "bees", "cats")):
        (root / name).mkdir(parents=True)
        for i in range(60):
            image = np_rng.randint(0, 120, (20, 20, 3))
            image[:, 6 * k : 6 * k + 8] += 120
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.mark.slow
def test_first_steps_as_they_are_written(tmp_path):
    """The commands for newcomers, typed one after the other."""
    for name in ("configs", "mosaic_jax", "launch.py", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    write_images(tmp_path / "images")
    text = (ROOT / "docs" / "studies.md").read_text()
    text = text[text.index("## First steps") :]
    steps = re.search(r"```\n(.*?)```", text, re.DOTALL)[1]
    bin_folder = pathlib.Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    environment.pop("XLA_FLAGS", None)
    subprocess.run(["bash", "-euc", steps], cwd=tmp_path, env=environment, check=True)
    for page in ("digits_mosaic/report.html", "longer/report.html", "compare.html"):
        assert (tmp_path / "runs" / page).stat().st_size > 20_000
    assert (tmp_path / "runs" / "own" / "summary.json").exists()
    assert "distill.steps" in (tmp_path / "runs" / "compare.html").read_text()


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_files_that_are_named_exist(page):
    named = set(
        re.findall(r"`((?:tests|configs|docs|examples)/[\w/.]+)`", page.read_text())
    )
    real = {name for name in named if "DATASET" not in name}
    assert not {name for name in real if not (ROOT / name).exists()}


def test_the_readme_is_short_and_its_names_are_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    named = set(re.findall(r"\bmj\.([\w.]+)", text))
    assert {"Study", "configs.get"} <= named
    for name in named:
        assert operator.attrgetter(name)(mosaic_jax)
    for path in re.findall(r"\]\((?!http)(.*?)\)", text):
        assert (ROOT / path).is_file()
