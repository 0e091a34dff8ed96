"""mosaic sweep: bad input is one line and code 2, before any work."""

import pathlib

import pytest

from mosaic_jax.cli import launch, sweep
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


def test_a_script_for_slurm_that_cannot_be_written(tmp_path, capsys):
    path = tmp_path / "missing" / "sweep.sh"
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path), "--slurm", str(path)]
    told = one_line(capsys, lambda: sweep.main(arguments))
    assert f"--slurm = {path}: must lie in a folder that exists" in told
