"""`python -m mosaic_jax` is the console `mosaic`."""

import sys

from mosaic_jax.cli import main

if __name__ == "__main__":
    sys.exit(main.main())
