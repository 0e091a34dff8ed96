"""What every program does alike: exit codes, errors of one line, Ctrl-C."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from mosaic_jax import errors


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process with one line and code 130.

    Programs call it before their slow imports. While a study runs its own handler
    saves the state first; what is written outside of it is written whole or not at all.
    """
    # Started in the background by a shell, a program is not to hear Ctrl-C.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


def _end(signum: int, _: object) -> None:
    # An exception could be lost, or shown with its traces, in code that may raise none,
    # such as Python's import of a module.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def exit_code(program: Callable[[], None]) -> int:
    """Run `program`; errors that a user can mend are lines on stderr.

    Returns:
      0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    try:
        program()
    except errors.Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except Exception as error:
        lines = told(error)
        if not lines:
            raise
        print("\n".join(lines), file=sys.stderr)
        return 2
    return 0


def told(error: Exception) -> list[str]:
    """The lines that tell a user what to mend; empty: the program is to blame."""
    lines = []
    if isinstance(error, errors.MosaicError):
        lines = str(error).splitlines()
    elif isinstance(error, OSError):  # a disk that is full, a folder of others
        lines = [str(error)]
    elif isinstance(error, MemoryError):
        lines = [f"out of memory: {errors.reason(error)}: what was saved is kept"]
    elif isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        lines = [
            f"{errors.reason(error)}: lower model.width, a batch_size or"
            " compute.clients_at_once; what was saved is kept"
        ]
    return [f"error: {line}" for line in lines]
