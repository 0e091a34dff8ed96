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
    except errors.MosaicError as error:
        lines = str(error).splitlines()
    except OSError as error:  # a disk that is full or read-only, a folder of others
        lines = [str(error)]
    except MemoryError as error:
        lines = [f"out of memory: {errors.reason(error)}: what was saved is kept"]
    except RuntimeError as error:  # of XLA
        if "out of memory" not in str(error).lower():
            raise
        lines = [
            f"{errors.reason(error)}: lower model.width, a batch_size or"
            " compute.clients_at_once; what was saved is kept"
        ]
    else:
        return 0
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 2
