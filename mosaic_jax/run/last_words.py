"""What is to be said of a process that cannot say it itself any more.

The kernel kills without a word, and `jax.distributed` ends a process by `abort` when it
cannot join the others or when their coordinator is gone. So a small process beside this
one is told, ahead of time, what to print in that case.
"""

import atexit
import contextlib
import subprocess
import sys

from mosaic_jax.run import programs

# Prints the last line that it was told, once the process that told it has ended.
_HELPER = """
import sys
line = ""
for line in sys.stdin:
    pass
if line.strip():
    print(line.strip(), file=sys.stderr, flush=True)
"""


class LastWords:
    """The line that is printed if this process ends and cannot print it itself."""

    def __init__(self, line: str) -> None:
        """Start the helper, which ends with this process.

        Args:
          line: to be printed.
        """
        # In a session of its own, so that Ctrl-C does not reach it.
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _HELPER],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.drop)
        programs.before_end(self.drop)
        self.change(line)

    def change(self, line: str) -> None:
        """Replace the line.

        Args:
          line: to be printed from now on.
        """
        assert self._helper.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # somebody killed the helper
            self._helper.stdin.write(f"{line}\n")
            self._helper.stdin.flush()

    def drop(self) -> None:
        """Nothing is to be printed: this process ends as it should."""
        self.change("")
