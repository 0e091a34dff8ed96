"""What all command-line programs have in common: exit codes, errors, Ctrl-C."""

import argparse
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence

from mosaic_jax.core import errors


def end_on_interrupt() -> None:
    """From now on, Ctrl-C ends this process with one line and exit code 130.

    Programs call this before their slow imports. While a study runs, its own handler
    saves the state first. All other files are written whole or not at all.
    """
    # A shell starts programs in the background with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)


# Called before a signal ends this process at once.
_before_end: list[Callable[[], None]] = []


def before_end(call: Callable[[], None]) -> None:
    """Have something done before a signal ends this process.

    Args:
      call: what to do; it must be quick.
    """
    _before_end.append(call)


def farewell() -> None:
    """Do all that `before_end` was told: a signal is about to end this process."""
    for call in _before_end:
        with contextlib.suppress(Exception):
            call()


def _end(signum: int, _: object) -> None:
    # No exception: it could be lost, or printed with its trace, within code such as
    # Python's import of a module.
    farewell()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"interrupted\n")
    os._exit(128 + signum)


def spelled(program: str) -> str:
    """How a user started this console, from `sys.argv[0]`, such as "mosaic"."""
    name = os.path.basename(program)
    if name == "launch.py":
        return "python launch.py"
    return "python -m mosaic_jax" if name == "__main__.py" else "mosaic"


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Of a command's line; its flags must be spelt out, so that no slip is a flag.

    Args:
      command: its name, after "mosaic".
      description: what --help says of it, printed as it is.
    """
    return argparse.ArgumentParser(
        prog=f"mosaic {command}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )


def without(words: Sequence[str], flags: Collection[str]) -> list[str]:
    """Words of a command line without some flags, given by name, and their values."""
    names = {f"{dashes}{flag}" for flag in flags for dashes in ("-", "--")}
    return [
        word
        for before, word in itertools.pairwise(["", *words])
        if before not in names and word.partition("=")[0] not in names
    ]


def exit_code(program: Callable[[], None]) -> int:
    """Run `program`; errors that a user can fix become lines on stderr.

    Returns:
      The exit code: 0; 2 for a user's error; 3 where some of several studies came to no
      end; 128 + the number of a signal.
    """
    try:
        program()
    except errors.Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except Exception as error:
        lines = error_lines(error)
        if not lines:
            raise
        print("\n".join(lines), file=sys.stderr)
        return 3 if isinstance(error, errors.SomeFailed) else 2
    return 0


def error_lines(error: BaseException) -> list[str]:
    """Lines that tell a user what to fix; [] if the error is the program's own."""
    lines = []
    if isinstance(error, errors.MosaicError):
        lines = str(error).splitlines()
    elif isinstance(error, OSError):  # a full disk, missing permissions
        lines = [str(error)]
    elif isinstance(error, MemoryError):
        lines = [f"out of memory: {errors.reason(error)}: what was saved is kept"]
    elif isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        lines = [
            f"{errors.reason(error)}: lower model.width, a batch_size or"
            " compute.clients_at_once; what was saved is kept"
        ]
    return [f"error: {line}" for line in lines]
