"""Every command in the README and the docs is one that its program takes."""

import importlib
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

import launch
from mosaic_jax import settings, sweep

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """Commands of each fenced block that has any, without comments."""
    for text in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
        lines = text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines if line.strip()]
        commands = [words for words in found if words and words[0] in KNOWN]
        if commands:
            yield commands


KNOWN = ("python", "pip", "make")
COMMANDS = [
    pytest.param(words, id=" ".join(words))
    for page in PAGES
    for block in blocks(page)
    for words in block
]


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_taken(words, tmp_path):
    if words[0] == "make":
        assert f"{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "pip":
        for word in words[2:]:
            assert word.startswith("-") or "[" in word or (ROOT / word).is_file()
    elif words[1] == "launch.py":
        takes_settings(words)
    elif words[1:3] == ["-m", "mosaic_jax.sweep"]:
        takes_sweep(words[3:], tmp_path)
    elif words[1] == "-m" and words[2] != "pytest":
        takes_flags(words[2], words[3:])


def takes_settings(words):
    """The flags parse and the settings are valid."""
    code = (
        "import launch, sys; launch.parse(sys.argv);"
        "from mosaic_jax import settings;"
        "settings.from_mapping(launch._CONFIG.value.to_dict())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words[2:]],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert launch.config_argument(words)


def takes_sweep(words, tmp_path):
    """Every cell's settings are valid."""
    grid = [words[i + 1] for i, word in enumerate(words) if word == "--grid"]
    config = sweep.load_config(words[words.index("--config") + 1])
    found = [sweep.parse_grid(one, config) for one in grid]
    for cell in sweep.build(config, found, 1, tmp_path).cells.values():
        settings.from_mapping(cell)


def takes_flags(module, words):
    """The module's parser has each flag that the command has."""
    if module == "mosaic_jax.data":
        assert words[0] in settings.DATA_SETS
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    for word in words:
        if word.startswith("-"):
            assert f'"{word.partition("=")[0]}"' in path.read_text(), word


def test_modules_that_commands_name_exist():
    for page in PAGES:
        for name in re.findall(r"python -m (mosaic_jax[\w.]*)", page.read_text()):
            assert importlib.util.find_spec(name), (page, name)


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
    """The README's commands for newcomers, typed one after the other."""
    for name in ("configs", "mosaic_jax", "launch.py"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    write_images(tmp_path / "images")
    text = (ROOT / "README.md").read_text()
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
