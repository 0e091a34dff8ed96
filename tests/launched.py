"""Studies in processes of their own, as users start them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "tests/end_to_end/tiny_config.py"


def command(workdir, *more, config=CONFIG):
    """The words that start a study of `config`."""
    start = [sys.executable, "launch.py", "--config", config]
    return [*start, "--workdir", workdir, *more]


def flags_of_one_device():
    """XLA_FLAGS of these tests, without the devices that they make."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if "device_count" not in flag)


def environment():
    """Of such a process: it finds the tests' modules and compiled programs."""
    cache = ROOT / ".pytest_cache" / "xla"
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }


def run(workdir, *more, config=CONFIG):
    """The study's process, ended."""
    return subprocess.run(
        command(workdir, *more, config=config),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(workdir, *more, config=CONFIG, before=(), **changes):
    """The study's process, under way, with the words `before` in front of its command.

    The `changes` are those of `subprocess.Popen`.
    """
    given = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(
        [*before, *command(workdir, *more, config=config)],
        cwd=ROOT,
        text=True,
        **{"env": environment()} | given | changes,
    )


def stop_at(workdir, moment, signum):
    """Start, send `signum` when the log shows `moment`; exit code and the log."""
    log = []
    with start(workdir) as process:
        for line in process.stderr:
            log.append(line)
            if moment in line:
                process.send_signal(signum)
                moment = "\0"
    return process.returncode, "".join(log)
