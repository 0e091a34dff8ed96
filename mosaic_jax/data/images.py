"""Decoding of image files of any mode and bit depth to 8 bits per channel."""

import concurrent.futures
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image, TiffImagePlugin

from mosaic_jax.core import errors
from mosaic_jax.data.dataset import Size

FILES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm"),
    *(".tif", ".tiff"),
)
# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def decode(content: bytes, size: Size, mode: str = "RGB") -> np.ndarray:
    """Decode and resize an image file to uint8 [size, size, D].

    Transparent pixels become white; values of more than 8 bits are scaled by the range
    of the format.

    Args:
      content: bytes of the file.
      size: height and width of the result in pixels.
      mode: "RGB" (D = 3) or "L" for grey (D = 1).

    Raises:
      OSError, ValueError and others: the file is not an image that can be decoded.
    """
    with Image.open(io.BytesIO(content)) as file:
        image = _eight_bit(file).convert(mode)
    height, width = size
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, -1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """`image` as an opaque one of at most 8 bits per channel.

    Raises:
      ValueError: the range of its values is not known, or values are out of range.
    """
    tags = getattr(image, "tag_v2", {})
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("signed integers: must be unsigned, of 8 or 16 bits")
    # Modes "I", "I;16..." and "F" have more than 8 bits, all others 8 or 1.
    if image.mode[0] not in "IF":
        return _opaque(image)
    array, white = np.asarray(image), _white(image)
    low, high = array.min(), array.max()
    # Written so that NaN fails as well.
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
    """The value of white in an image of more than 8 bits; black is 0.

    Raises:
      ValueError: its format does not define one.
    """
    if image.mode == "F":
        return 1.0
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode != "I":
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
    # Pillow converts premultiplied modes to no others than these.
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    image = (image.convert(straight) if straight else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def decode_all(
    files: Iterable[tuple[str, bytes]], size: Size, mode: str
) -> Iterable[np.ndarray]:
    """Decode image files on all cores, with a few hundred of them in memory at a time.

    Args:
      files: names and contents.
      size: height and width of the results in pixels.
      mode: "RGB" (D = 3) or "L" for grey (D = 1).

    Returns:
      uint8 [*size, D] of each file, in order.

    Raises:
      DataError: a file cannot be decoded; the message names it.
    """

    def one(entry: tuple[str, bytes]) -> np.ndarray:
        try:
            return decode(entry[1], size, mode)
        except MemoryError:
            raise
        except Exception as error:
            raise _not_an_image(entry[0], error) from error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting: list[concurrent.futures.Future] = []
        for entry in files:
            waiting.append(pool.submit(one, entry))
            if len(waiting) >= 256:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def look_at(path: pathlib.Path | str, content: bytes | None = None) -> tuple[int, bool]:
    """Longer side of an image file in pixels, and whether it is grey, from its header.

    Args:
      path: of the file, or its name in messages where there is its `content`.
      content: what the file holds; None: it is read.

    Raises:
      DataError: the file is not an image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            return max(image.size), Image.getmodebase(image.mode) == "L"
    except Exception as error:
        raise _not_an_image(path, error) from error


def _not_an_image(path: pathlib.Path | str, error: Exception) -> errors.DataError:
    return errors.DataError(f"{path}: no image: {errors.reason(error)}")
