"""mosaic run: flags and configuration files; what a user gets wrong is one line."""

import pathlib

import pytest

from mosaic_jax import configs
from mosaic_jax.cli import config_files, launch, run
from mosaic_jax.core import errors

ROOT = pathlib.Path(__file__).parents[2]


def wrong(*words):
    """The line that tells what is wrong with `words`."""
    with pytest.raises(errors.ConfigError) as caught:
        run.parse(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "digits_mosaic"],
        ["--config=digits_mosaic:default"],
        ["-config", str(ROOT / "configs" / "digits_mosaic.py")],
        [f"--config={ROOT / 'configs' / 'digits_mosaic.py'}:default"],
    ],
)
def test_a_file_or_a_name(words):
    given = run.parse([*words, "--config.distill.steps=7", "--workdir=here"])
    assert given.config.data.name == "digits"
    assert given.config.distill.steps == 7
    assert given.workdir == "here" and given.reuse_from == []


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("digits_mosaic").endswith("configs/digits_mosaic.py")
    (tmp_path / "digits_mosaic").write_text("")
    assert config_files.find("digits_mosaic") == "digits_mosaic"


def test_the_library_has_the_files_of_the_clone():
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"base"}
    assert configs.shipped().keys() == names
    for name in names:
        assert config_files.load(name) == config_files.load(f"{ROOT}/configs/{name}.py")


def test_what_is_wrong():
    config = ["--config", "digits_mosaic"]
    assert wrong().startswith("--config = '': must be a file, such as")
    assert wrong("--config", "nope:x").startswith("--config = 'nope': must be a file")
    assert "nope: unknown variant; known: " in wrong("--config", "digits_mosaic:nope")
    assert "did you mean 'distill.temperature'?" in wrong(
        *config, "--config.distill.tempreature=1.0"
    )
    assert wrong(*config, "more") == "more: must be a flag, such as --config"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "--config.distill.steps=many",
            "distill.steps = 'many': must be a whole number",
        ),
        ("--config.data.alpha=a", "data.alpha = 'a': must be a number"),
        (
            "--config.distill.balanced=a",
            "distill.balanced = 'a': must be true or false",
        ),
        ("--config.data=3", "data = '3': must be set field by field; mosaic list"),
        (
            "--config.distil.steps=1",
            "--config.distil.steps: unknown field, did you mean",
        ),
        ("--config.zzzz=1", "--config.zzzz: unknown field, mosaic list fields has all"),
        ("--config.seed", "--config.seed: must have a value, --config.seed=VALUE"),
        ("--confg.seed=1", "--confg.seed: no such flag; mosaic run --help has all"),
        ("--dry_run=often", "--dry_run = 'often': must be measure, or no value"),
        ("--num_processes=a", "num_processes = 'a': must be a whole number"),
    ],
)
def test_a_wrong_flag_says_what_would_be_right(word, expected):
    assert wrong("--config", "digits_mosaic", word).startswith(expected)


def test_elements_of_a_field_can_be_set():
    words = ["--config", "digits_mosaic", "--config.model.others[0]=cnn"]
    assert "unknown field" not in wrong(*words)  # there is none to set


def test_exit_codes(monkeypatch, capsys):
    assert run.main(["--config", "nope"]) == 2
    assert capsys.readouterr().err.startswith("error: --config = 'nope'")
    given = {}
    monkeypatch.setattr(launch, "run", lambda *_, **found: given.update(found) or 7)
    words = ["--config=digits_mosaic", "--process_id=1", "--num_processes=2"]
    assert run.main([*words, "--dry_run", "--reuse_from=a", "--reuse_from=b"]) == 7
    assert given["of_processes"] == ("", 2, 1)
    assert given["dry_run"] == "count" and given["reuse_from"] == ["a", "b"]
    for flag, how in (("", ""), ("--dry_run=measure", "measure"), ("--nodry_run", "")):
        assert run.main([*words, *filter(None, [flag]), "--target=h100"]) == 7
        assert (given["dry_run"], given["target"]) == (how, "h100")


def test_default_workdir():
    def at(*words):
        return run.default_workdir(run.config_argument(words))

    assert at("--config", "configs/digits_mosaic.py") == "runs/digits_mosaic"
    assert at("--config=configs/a.py:b", "--config.seed=1") == "runs/a_b"
    assert at("--config=baselines:digits:fedavg") == "runs/baselines_digits_fedavg"


def test_help_names_every_flag(capsys):
    assert run.main(["--help"]) == 0
    told = capsys.readouterr().out
    flags = "workdir", "reuse_from", "dry_run", "target", "coordinator", "process_id"
    for flag in flags:
        assert flag in told
