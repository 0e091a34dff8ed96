"""Run a study: python launch.py --config configs/digits_mosaic.py --workdir runs/d.

The same as `mosaic run`. Running the same command again goes on where it stopped. Any
field can be set on the command line, after --config: --config.distill.steps=200.
"""

import sys

from mosaic_jax.cli import main

if __name__ == "__main__":
    sys.exit(main.main(["run", *sys.argv[1:]]))
