"""Run a study: python launch.py --config configs/digits_mosaic.py --workdir runs/d.

Running the same command again goes on where it stopped. Any field can be set on the
command line, after --config: --config.distill.steps=200.
"""

import logging
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory; by default runs/CONFIG.")
_REUSE = flags.DEFINE_multi_string(
    "reuse_from", [], "Run directory whose finished stages may be used."
)


def main(_: list[str]) -> None:
    """Run the study and report; errors a user can mend end with code 2."""
    # Imported here so that a wrong flag is answered at once.
    from mosaic_jax import cli

    sys.exit(
        cli.run(
            _CONFIG.value.to_dict(),
            pathlib.Path(_WORKDIR.value or cli.default_workdir(sys.argv)),
            reuse_from=_REUSE.value,
            command=sys.argv,
        )
    )


def parse(argv: list[str]) -> list[str]:
    """Parse flags; a wrong one is a single line and exit code 2."""
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise ValueError("--config: missing, such as configs/digits_mosaic.py")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]}: must be a flag, such as --config")
        return rest
    except Exception as error:  # configs are Python and may raise anything
        reason = " ".join(str(error.args[0] if error.args else error).split())
        if isinstance(error, (KeyError, AttributeError)):
            reason = f"--config: unknown field {reason}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
