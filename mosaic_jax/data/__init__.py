"""Data sets, their split over clients, and what happens to an image on the way in.

The functions of `given` are here too, imported when they are first used: each makes a
data set of what a user has, for `mosaic_jax.Study(data=...)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_jax.data.given import arrays as arrays
    from mosaic_jax.data.given import folder as folder
    from mosaic_jax.data.given import hf as hf
    from mosaic_jax.data.given import npz as npz
    from mosaic_jax.data.given import tfds as tfds

_GIVEN = ("arrays", "folder", "hf", "npz", "tfds")


def __getattr__(name: str) -> Any:
    """A function of `given`.

    Raises:
      AttributeError: there is none of that name.
    """
    if name not in _GIVEN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.given"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_GIVEN])
