"""Image files of every mode and bit depth as bytes per channel."""

import concurrent.futures
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from mosaic_jax import errors
from mosaic_jax.data import limits

FILES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm"),
    *(".tif", ".tiff"),
)
# Entries of a TIFF's directory.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def decode(content: bytes, size: int, mode: str = "RGB") -> np.ndarray:
    """An image file as uint8 [size, size, D]; D is 1 for mode "L", 3 for "RGB".

    Transparent pixels lie on white; more than 8 bits are scaled by the format's range.

    Raises:
      OSError, ValueError and others: it is no image that can be read.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = _eight_bit(file).convert(mode)
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(size, size, -1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """`image` in a mode of 8 bits, or 1, per channel, and opaque.

    Raises:
      ValueError: black and white of its numbers are not known, or it goes past them.
    """
    tags = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("signed integers: must be unsigned, of 8 or 16 bits")
    # "I", "I;16" and its like, "F"; the numbers of all others are bytes or bits.
    if image.mode[0] not in "IF":
        return _opaque(image)
    array, white = np.asarray(image), _white(image)
    low, high = array.min(), array.max()
    # Of what is not a number neither holds.
    if not (low >= 0 and high <= white):
        raise ValueError(
            f"values {low:g}..{high:g} of mode {image.mode}: must be 0..{white:g}"
        )
    share = array / white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        share = 1 - share
    if "transparency" in image.info:
        share = np.where(array == image.info["transparency"], 1, share)
    return Image.fromarray((255 * share).round().astype(np.uint8))


def _white(image: Image.Image) -> float:
    """What white is in an image of more than 8 bits; black is 0.

    Raises:
      ValueError: its format does not say.
    """
    if image.mode == "F":
        return 1.0
    if image.format == "TIFF" and image.mode != "I":
        return 2.0 ** image.tag_v2[_BITS][0] - 1
    if image.format in ("PNG", "PPM"):
        return 2.0**16 - 1
    raise ValueError(
        f"mode {image.mode} of {image.format}: its range is not known: must have 8 or"
        " 16 bits, or be floats in 0..1"
    )


def _opaque(image: Image.Image) -> Image.Image:
    if "transparency" not in image.info and not image.mode.lower().endswith("a"):
        return image
    # Premultiplied ones have one way out.
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    image = (image.convert(straight) if straight else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def decode_all(
    files: Iterable[tuple[str, bytes]], size: int, mode: str
) -> Iterable[np.ndarray]:
    """Images in order, decoded by all cores, a few hundred files in memory at a time.

    Raises:
      DataError: one is no image; names it.
    """

    def one(entry: tuple[str, bytes]) -> np.ndarray:
        try:
            return decode(entry[1], size, mode)
        except MemoryError:
            raise
        except Exception as error:
            raise _no_image(entry[0], error) from error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting: list[concurrent.futures.Future] = []
        for entry in files:
            waiting.append(pool.submit(one, entry))
            if len(waiting) >= 256:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def look_at(path: pathlib.Path) -> tuple[int, bool]:
    """Longer side of an image file and whether it is grey; its header is read.

    Raises:
      DataError: it is no image.
    """
    try:
        with Image.open(path) as image:
            return max(image.size), Image.getmodebase(image.mode) == "L"
    except Exception as error:
        raise _no_image(path, error) from error


def _no_image(path: pathlib.Path | str, error: Exception) -> errors.DataError:
    return errors.DataError(f"{path}: no image: {errors.reason(error)}")
