"""Run a study: python launch.py --config configs/digits_mosaic.py --workdir runs/d.

Running the same command again goes on where it stopped. Any field can be set on the
command line, after --config: --config.distill.steps=200.
"""

import pathlib
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from mosaic_jax import programs

    programs.end_on_interrupt()

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory; by default runs/CONFIG.")
_REUSE = flags.DEFINE_multi_string(
    "reuse_from", [], "Run directory whose finished stages may be used."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only tell what the study would cost, by a few steps of each."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where several run one study."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes in all.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Of this one, from 0.")


def main(_: list[str]) -> None:
    """Run the study and report; errors a user can mend end with code 2."""
    # Imported here so that a wrong flag is answered at once.
    from mosaic_jax import cli

    sys.exit(
        cli.run(
            _CONFIG.value.to_dict(),
            pathlib.Path(_WORKDIR.value or default_workdir(config_argument(sys.argv))),
            reuse_from=_REUSE.value,
            command=sys.argv,
            dry_run=_DRY_RUN.value,
            of_processes=(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value),
        )
    )


def config_argument(argv: Sequence[str]) -> str:
    """The value of --config, "" if there is none."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--config", "-config"):
            return value or after
    return ""


def default_workdir(config: str) -> str:
    """runs/NAME or runs/NAME_VARIANT for path/NAME.py[:VARIANT]."""
    path, *variants = config.split(":")
    return "/".join(["runs", "_".join([pathlib.Path(path).stem, *variants])])


def parse(argv: list[str]) -> list[str]:
    """Parse flags; a wrong one is a single line and exit code 2."""
    path = config_argument(argv).partition(":")[0]
    try:
        if not {"--help", "--helpfull", "-h"} & set(argv) and not (
            pathlib.Path(path).is_file()
        ):
            raise ValueError(
                f"--config = {path!r}: must be a file, such as configs/digits_mosaic.py"
            )
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"{rest[1]}: must be a flag, such as --config")
        return rest
    except Exception as error:  # configs are Python and may raise anything
        text = str(error.args[0] if error.args else error).replace("\\n", "\n")
        lines = [line.strip(" '\"\\") for line in text.strip().splitlines()]
        # An error inside a config comes with its traceback: its last line says it.
        reason = lines[-1] if "Traceback" in text else " ".join(lines)
        if isinstance(error, KeyError | AttributeError):
            reason = f"--config: unknown field {reason}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
