"""Processes of one study that are not alike: told by all, at once, before any work."""

import contextlib
import resource
import shutil
import socket
import subprocess
import time

import pytest

from tests.end_to_end import test_launch

FIELDS = [
    "--config.method=federated",
    "--config.init.rounds=2",
    "--config.evaluation.every=1",
    "--config.warmup.rounds=0",
    "--config.finetune.rounds=0",
    "--config.compute.devices=0",
]
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(workdirs, more, count=2, largest_file=None):
    """Exit code and output of each process; process i gets `more[i]`.

    The first cannot write files larger than `largest_file` bytes.
    """

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [*FIELDS, f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    processes = [
        subprocess.Popen(
            test_launch.command(workdirs[i], *shared, *more[i], f"--process_id={i}"),
            cwd=test_launch.ROOT,
            env=test_launch.environment() | {"XLA_FLAGS": FLAGS},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limited if largest_file and i == 0 else None,
        )
        for i in range(count)
    ]
    output = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], output


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("--config.local.learning_rate=0.5", "local.learning_rate = 0.05 in process 0"),
        ("--config.seed=7", "seed = 0 in process 0"),
        ("--config.init.rounds=3", "init.rounds = 2 in process 0"),
        ("--config.log.every_steps=3", "log.every_steps = 2 in process 0"),
    ],
)
def test_another_setting_is_one_line_in_each(tmp_path, other, told):
    codes, output = start([tmp_path / "run"] * 2, [[], [other]])
    assert codes == [2, 2], output
    for text in output:
        (line,) = errors_in(text)
        assert told in line and "in process 1 on" in line
        assert other.partition("=")[2] in line
        assert "Traceback" not in text
    assert not list(tmp_path.glob("run/stages/*/*"))


def test_a_missing_data_folder_in_one_ends_both(tmp_path):
    begin = time.monotonic()
    codes, output = start(
        [tmp_path / "run"] * 2,
        [[], ["--config.data.name=npz", f"--config.data.dir={tmp_path / 'none.npz'}"]],
    )
    assert codes == [2, 2], output
    (line,) = errors_in(output[1])
    assert "none.npz: no such file" in line
    (line,) = errors_in(output[0])
    assert line.startswith("error: process 1 on ") and "none.npz: no such file" in line
    assert time.monotonic() - begin < 100


def test_a_workdir_that_is_not_shared(tmp_path):
    codes, output = start([tmp_path / "one", tmp_path / "other"], [[], []])
    assert codes == [2, 2], output
    for text in output:
        (line,) = errors_in(text)
        assert "--workdir" in line and "true in process 0" in line


def test_other_stages_in_the_run_directory(tmp_path):
    done = test_launch.run(tmp_path / "one", *FIELDS[:-1])
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "stages" / "init")
    codes, output = start([tmp_path / "one", tmp_path / "other"], [[], []])
    assert codes == [2, 2], output
    for text in output:
        assert any("finished stages" in line for line in errors_in(text)), text


def test_one_that_gives_up_while_training_ends_the_other(tmp_path):
    """The first process cannot write its checkpoints: a disk that is full, say."""
    begin = time.monotonic()
    codes, output = start([tmp_path / "run"] * 2, [[], []], largest_file=3000)
    assert codes == [2, 2], output
    (line,) = errors_in(output[0])
    assert "cannot be saved" in line or "File too large" in line
    (told,) = errors_in(output[1])
    assert told.startswith("error: process 0 on ") and " gave up: " in told
    assert time.monotonic() - begin < 100
