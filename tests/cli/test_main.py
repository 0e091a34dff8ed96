"""The console: which command it runs, and what it says of itself."""

import signal
import sys

import pytest

import mosaic_jax
from mosaic_jax.cli import list as list_command
from mosaic_jax.cli import main


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The console changes its process in these two ways; this one is the tests'."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_usage(capsys, words):
    assert main.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2 : 2 + len(main.COMMANDS)]] == list(
        main.COMMANDS
    )


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{mosaic_jax.__version__}\n"


def test_an_unknown_command_is_one_line_and_code_2(capsys):
    assert main.main(["rnu"]) == 2
    known = ", ".join(main.COMMANDS)
    told = f"error: mosaic rnu: must be one of {known}\n"
    assert capsys.readouterr().err == told


def test_a_command_gets_the_words_after_it(monkeypatch):
    monkeypatch.setattr(list_command, "main", lambda words: len(words))
    assert main.main(["list", "fields", "data"]) == 2


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(capsys, command):
    try:
        assert main.main([command, "--help"]) == 0
    except SystemExit as end:  # argparse
        assert end.code == 0
    assert f"mosaic {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", main.COMMANDS)
def test_no_command_takes_the_beginning_of_a_flag_for_it(command):
    try:
        code = main.main([command, "--hel"])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
