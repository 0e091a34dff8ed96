"""The configurations that come with the library, as `mosaic_jax.configs.digits_mosaic`.

In a clone they lie in its folder `configs/`; an installed library has them here.
"""

import pathlib

_CLONE = pathlib.Path(__file__).parents[2] / "configs"
if (_CLONE / "base.py").is_file():
    __path__.append(str(_CLONE))
