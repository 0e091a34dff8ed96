"""Processes of one study that are not alike: told by all, at once, before any work."""

import shutil
import signal
import sys
import time

import pytest

from mosaic_jax.cli import run
from mosaic_jax.core import errors
from mosaic_jax.run import peers, processes
from tests import launched, several


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_another_setting_is_one_line_in_each(tmp_path):
    """Which settings are compared: tests/run/test_runner.py."""
    other = "--config.local.learning_rate=0.5"
    codes, output = several.start([tmp_path / "run"] * 2, [[], [other]])
    assert codes == [2, 2], output
    for text in output:
        (line,) = errors_in(text)
        assert "local.learning_rate = 0.05 in process 0" in line
        assert "0.5 in process 1 on" in line
        assert "Traceback" not in text
    assert not list(tmp_path.glob("run/stages/*/*"))


@pytest.mark.slow
def test_a_missing_data_folder_in_one_ends_both(tmp_path):
    begin = time.monotonic()
    codes, output = several.start(
        [tmp_path / "run"] * 2,
        [[], ["--config.data.name=npz", f"--config.data.dir={tmp_path / 'none.npz'}"]],
    )
    assert codes == [2, 2], output
    (line,) = errors_in(output[1])
    assert "none.npz: no such file" in line
    (line,) = errors_in(output[0])
    assert line.startswith("error: process 1 on ") and "none.npz: no such file" in line
    assert time.monotonic() - begin < 100


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(tmp_path):
    codes, output = several.start([tmp_path / "one", tmp_path / "other"], [[], []])
    assert codes == [2, 2], output
    for text in output:
        (line,) = errors_in(text)
        assert "--workdir" in line and "true in process 0" in line


@pytest.mark.slow
def test_other_stages_in_the_run_directory(tmp_path):
    done = launched.run(tmp_path / "one", *several.FIELDS[:-1])
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "stages" / "init")
    codes, output = several.start([tmp_path / "one", tmp_path / "other"], [[], []])
    assert codes == [2, 2], output
    for text in output:
        assert any("finished stages" in line for line in errors_in(text)), text


def test_one_that_gives_up_while_training_ends_the_other(tmp_path):
    """The first process cannot write its checkpoints: a disk that is full, say."""
    begin = time.monotonic()
    codes, output = several.start([tmp_path / "run"] * 2, [[], []], largest_file=3000)
    assert codes == [2, 2], output
    (line,) = errors_in(output[0])
    assert "cannot be saved" in line or "File too large" in line
    (told,) = errors_in(output[1])
    assert told.startswith("error: process 0 on ") and " gave up: " in told
    assert time.monotonic() - begin < 100


@pytest.mark.slow
def test_one_that_reuses_stages_and_one_that_does_not(tmp_path):
    done = launched.run(tmp_path / "source", *several.FIELDS[:-1])
    assert done.returncode == 0, done.stderr
    reuse = [f"--reuse_from={tmp_path / 'source'}"]
    codes, output = several.start([tmp_path / "run"] * 2, [[], reuse])
    assert codes == [2, 2], output
    for text in output:
        assert any("found by --reuse_from" in line for line in errors_in(text)), text


@pytest.mark.slow
def test_one_that_only_estimates(tmp_path):
    codes, output = several.start([tmp_path / "run"] * 2, [["--dry_run"], []])
    assert codes == [2, 2], output
    for text in output:
        (line,) = errors_in(text)
        assert line.startswith('error: --dry_run = "count" in process 0'), line


@pytest.mark.slow
def test_two_that_call_themselves_the_first(tmp_path):
    joins = ["--config.compute.join_seconds=5"]
    codes, output = several.start([tmp_path / "run"] * 2, [joins] * 2, ids=[0, 0])
    told = [errors_in(text)[-1] for text in output]
    assert 0 not in codes, output
    assert any(
        "Address already in use: is another process number 0?" in t for t in told
    )
    (other,) = [t for t in told if "Address" not in t]
    assert "ended while it waited for the others at 127.0.0.1:" in other
    assert "at most 5 s (compute.join_seconds)" in other


@pytest.mark.slow
def test_ctrl_c_while_one_waits_for_the_others(tmp_path):
    """It waits outside of Python, where no handler of Python's is called."""
    both = several.launch([tmp_path / "run"] * 2, [[]] * 2, ids=[0, 0])
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    (left,) = [process for process in both if process.poll() is None]
    while "waiting for the other processes at" not in (line := left.stdout.readline()):
        assert line, "it has ended"
    left.send_signal(signal.SIGINT)
    text, _ = left.communicate(timeout=20)
    assert left.returncode == -signal.SIGINT
    assert "ended while it waited for the others at 127.0.0.1:" in text


def test_an_unknown_field_in_one_ends_both(tmp_path):
    begin = time.monotonic()
    codes, output = several.start([tmp_path / "run"] * 2, [[], ["--config.sed=3"]])
    assert codes == [2, 2], output
    (line,) = errors_in(output[1])
    assert "--config.sed: unknown field, did you mean 'seed'?" in line
    (line,) = errors_in(output[0])
    assert line.startswith("error: process 1 on ") and "--config.sed: unknown" in line
    assert time.monotonic() - begin < 100


def test_an_unknown_field_is_told_where_the_others_are_not_there(monkeypatch, capsys):
    field = ["--config.sed=3", "--coordinator=127.0.0.1:9"]
    monkeypatch.setattr(processes, "_TO_TELL", 1)
    monkeypatch.setattr(peers, "end", sys.exit)
    words = ["--config=digits_mosaic", *field, "--num_processes=2", "--process_id=1"]
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    assert ended.value.code == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert "--config.sed: unknown field" in line


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("nonsense", "must be HOST:PORT"),
        ("127.0.0.1:9", "no process 0 after 1 s"),
        ("127.0.0.1:70000", "with a port from 1 to"),
        ("a..b:1", "no name of a host"),
    ],
)
def test_a_coordinator_that_is_not_there(address, told):
    with pytest.raises(
        errors.ConfigError, match=f"--coordinator = .*{address}.*{told}"
    ):
        processes.join(address, 2, 1, join_seconds=1)
