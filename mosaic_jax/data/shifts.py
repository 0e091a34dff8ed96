"""Images that look different at each client, by their nature and not by their classes.

A shift changes the images of client i of C by a degree that grows with i / C, so that
client 0 keeps its images as they are (NumPy and SciPy only).
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from mosaic_jax.core import errors, schema
from mosaic_jax.core.registry import Registry

# Images that are turned at once, whose copies as floats are small.
_CHUNK = 1000


def rotate(
    image: np.ndarray, degree: float, np_rng: np.random.RandomState
) -> np.ndarray:
    """Turned counter-clockwise by `degree` of a whole turn; what comes in is black.

    With four clients and a strength of 1 these are the four turns of Ghosh et al.
    (2020).

    Args:
      image: uint8 [n, H, W, D].
      degree: in [0, 1).
      np_rng: not used.
    """
    del np_rng
    angle = 360 * degree
    if angle % 90 == 0:
        return np.rot90(image, round(angle / 90), axes=(1, 2)).copy()
    result = np.empty_like(image)
    for start in range(0, len(image), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = ndimage.rotate(
            image[part], angle, axes=(1, 2), reshape=False, order=1
        )
    return result


def noise(
    image: np.ndarray, degree: float, np_rng: np.random.RandomState
) -> np.ndarray:
    """Gaussian noise, whose deviation is `degree` where white is 1 (Li et al., 2022).

    Args:
      image: uint8 [n, H, W, D].
      degree: >= 0.
      np_rng: draws the noise.
    """
    result = np.empty_like(image)
    for old, new in zip(image, result, strict=True):
        noisy = old + 255 * degree * np_rng.standard_normal(old.shape)
        new[:] = np.clip(np.round(noisy), 0, 255)
    return result


def colour(
    image: np.ndarray, degree: float, np_rng: np.random.RandomState
) -> np.ndarray:
    """Channels that are dimmed, each by a share that is drawn in [0, `degree`].

    Args:
      image: uint8 [n, H, W, D]; grey images become darker.
      degree: in [0, 1).
      np_rng: draws the shares, the same for all of these images.
    """
    kept = 1 - degree * np_rng.random_sample(image.shape[-1])
    tables = np.round(np.arange(256)[:, None] * kept).astype(np.uint8).T  # [D, 256]
    dimmed = [table[image[..., d]] for d, table in enumerate(tables)]
    return np.stack(dimmed, axis=-1)


# (uint8 [n, H, W, D], degree, random numbers) -> uint8 [n, H, W, D]
SHIFTS: Registry[Callable[..., np.ndarray]] = Registry(
    "data.shift",
    {"rotate": rotate, "noise": noise, "colour": colour},
    schema.Allowed(
        "a function of images uint8 [n, H, W, D], a degree and random numbers to such"
        " images",
        lambda found: callable(found) and not inspect.isclass(found),
    ),
)


def of_clients(
    image: np.ndarray,
    owner: np.ndarray,
    *,
    num_clients: int,
    name: str,
    strength: float,
    seed: int,
) -> np.ndarray:
    """Images, each changed as its client's are.

    Args:
      image: uint8 [N, H, W, D].
      owner: [N] int, client of each image, all of whose images are changed by one call
        of the shift; those of -1 stay as they are.
      num_clients: C.
      name: a name of `SHIFTS`, or "package.module:function" of a user's own.
      strength: client i's images are changed to the degree `strength` x i / C.
      seed: of the draws; each client has its own.

    Raises:
      ConfigError: there is no such shift.
      DataError: a user's function fails, or returns something else than such images.
    """
    function, result = SHIFTS.find(name), image.copy()
    for i in range(num_clients):
        numbers = np.flatnonzero(owner == i)
        # What a client draws does not depend on how many images others have.
        np_rng = np.random.RandomState([seed, i])
        degree = strength * i / num_clients
        if name in SHIFTS:
            result[numbers] = function(image[numbers], degree, np_rng)
        else:
            result[numbers] = _of_user(name, function, image[numbers], degree, np_rng)
    return result


def _of_user(
    name: str, function: Callable[..., Any], image: np.ndarray, *args: Any
) -> np.ndarray:
    """What a user's function returns, which may return or raise anything."""
    try:
        found = np.asarray(function(image, *args))
    except errors.MosaicError:
        raise
    except Exception as error:
        raise errors.DataError(
            f"data.shift = {name!r}: {type(error).__name__}: {errors.reason(error)}"
        ) from error
    if found.dtype != np.uint8 or found.shape != image.shape:
        raise errors.DataError(
            f"data.shift = {name!r}: has returned {found.dtype} of shape {found.shape}:"
            f" must be uint8 of shape {image.shape}"
        )
    return found
