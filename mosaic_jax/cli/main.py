"""The console: mosaic COMMAND; COMMANDS has them."""

import importlib
import os
import sys
from collections.abc import Sequence

from mosaic_jax.run import programs

# Each is a module of this package with `main(arguments) -> exit code`.
COMMANDS = {
    "run": "run a study",
    "sweep": "run many studies of one configuration",
    "submit": "submit either to Slurm",
    "show": "every field of a configuration, and which differ from the defaults",
    "watch": "watch a running study in the browser",
    "report": "draw the report of one run, or of several side by side",
    "data": "prepare and describe a data set",
    "translate": "a command line of the published programs, as one of these",
    "list": "what there is: data sets, methods, networks, configurations, fields",
}
# Commands that load JAX, and with it take seconds before they can say anything.
SLOW = ("run", "sweep", "submit")
_FIRST = """
first steps:
  mosaic run --config digits_mosaic    a study that takes minutes on two cores
  mosaic show digits_mosaic            its settings; each is a flag of mosaic run
  mosaic list                          what else there is"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first of `arguments` names.

    Returns:
      The exit code: 0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    # Before the slow imports of the command.
    programs.end_on_interrupt()
    _current_folder_last()
    words = sys.argv[1:] if arguments is None else arguments
    command, *rest = words or ["--help"]
    if command in SLOW and sys.stderr.isatty():
        print("loading JAX", file=sys.stderr)
    if command in COMMANDS:
        return importlib.import_module(f"mosaic_jax.cli.{command}").main(rest)
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        print(importlib.import_module("mosaic_jax").__version__)
        return 0
    known = ", ".join(COMMANDS)
    print(f"error: mosaic {command}: must be one of {known}", file=sys.stderr)
    return 2


def _current_folder_last() -> None:
    """Look for modules in the current folder, but for installed ones before.

    `python -m` puts that folder first, `mosaic` leaves it out; a user's own components
    must be the same ones however the console is started.
    """
    here = os.getcwd()
    sys.path[:] = [*(path for path in sys.path if path not in ("", here)), here]


def _usage() -> str:
    lines = [f"  mosaic {name:10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: mosaic COMMAND [--help] ...", "", *lines, _FIRST])


if __name__ == "__main__":
    sys.exit(main())
