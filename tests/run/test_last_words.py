"""What a process that was killed has to say."""

import signal
import subprocess
import sys

import pytest

CODE = """
import os, signal
from mosaic_jax.run.last_words import LastWords
words = LastWords("error: the first")
words.change("error: the second")
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            -signal.SIGKILL,
            "error: the second\n",
        ),
        ("os.abort()", -signal.SIGABRT, "error: the second\n"),
        ("words.drop(); os._exit(2)", 2, ""),
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
    ],
)
def test_they_are_said_only_by_who_cannot_speak(end, code, told):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(end=end)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (code, told)
