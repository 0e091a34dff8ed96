"""Image files of every mode and bit depth keep their picture, or are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mosaic_jax.core import errors
from mosaic_jax.data import sources

SIDE = 16
# Black on the left, white on the right.
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))


def read(folder, content, name="0.png"):
    """What the folder's reader makes of an image file; grey where it is [..., 1]."""
    for k in ("a", "b"):
        (folder / k).mkdir()
        for i in range(5):
            (folder / k / f"{i}{name[1:]}").write_bytes(content)
    _, found = sources.load("folder", folder)
    return found.train_image[0]


def is_ramp(image, tolerance=2):
    expected = np.repeat(255 * RAMP[..., None], image.shape[-1], -1)
    return np.abs(image - expected).max() <= tolerance


# --- every mode of Pillow, in every format that can hold it

FORMATS = {"PNG": "png", "TIFF": "tif", "PPM": "ppm", "GIF": "gif", "BMP": "bmp"}
FORMATS |= {"JPEG": "jpg", "WEBP": "webp"}


def ramp_of(mode):
    """The ramp in a mode; numbers of more than 8 bits go up to the mode's white."""
    grey = Image.fromarray((255 * RAMP).round().astype(np.uint8))
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32))
    if mode == "I":
        return Image.fromarray((65535 * RAMP).round().astype(np.int32))
    if mode.startswith("I;16"):
        kind = ">u2" if mode.endswith("B") else "<u2"
        data = (65535 * RAMP).round().astype(kind).tobytes()
        return Image.frombytes("I;16B" if kind == ">u2" else "I;16", grey.size, data)
    if mode == "1":
        return Image.fromarray(255 * (RAMP > 0.5).astype(np.uint8)).convert("1")
    if mode == "LAB":
        return Image.merge("LAB", [grey, *2 * [Image.new("L", grey.size, 128)]])
    if mode in ("La", "RGBa"):
        return grey.convert(mode[:-1] + "A").convert(mode)
    if mode in ("HSV", "YCbCr", "CMYK", "RGBX", "RGBA"):
        return grey.convert("RGB").convert(mode)
    if mode == "PA":
        return grey.convert("P").convert("PA")
    return grey.convert(mode)


def written():
    """(mode, format, content) of each pair that Pillow writes."""
    for mode in Image.MODES:
        for kind in FORMATS:
            # Their writer does away with what is to be read.
            if kind in ("GIF", "WEBP") and (mode[0] in "IF" or mode == "LAB"):
                continue
            buffer = io.BytesIO()
            options = {"lossless": True} if kind == "WEBP" else {}
            try:
                ramp_of(mode).save(buffer, kind, **options)
            except (OSError, ValueError, KeyError):
                continue
            yield pytest.param(mode, kind, buffer.getvalue(), id=f"{mode}-{kind}")


WRITTEN = list(written())
# What white is in 32-bit integers nobody knows.
REFUSED = {("I", "TIFF")}
# Only within Pillow: no format stores them.
IN_MEMORY = {"HSV", "La", "RGBa", "I;16N", "I;16L"}


def test_every_mode_is_tried():
    assert set(Image.MODES) - IN_MEMORY <= {param.values[0] for param in WRITTEN}


@pytest.mark.parametrize(("mode", "kind", "content"), WRITTEN)
def test_modes(tmp_path, mode, kind, content):
    name = f"0.{FORMATS[kind]}"
    if (mode, kind) in REFUSED:
        with pytest.raises(errors.DataError, match="no image: ") as error:
            read(tmp_path, content, name)
        assert "\n" not in str(error.value)
        return
    image = read(tmp_path, content, name)
    if mode == "LAB":
        # Its first channel is lightness, which sRGB has on another curve.
        linear = ((100 * RAMP + 16) / 116) ** 3
        expected = 255 * np.where(
            linear > 0.003, 1.055 * linear ** (1 / 2.4) - 0.055, 0
        )
        assert np.abs(image - expected[..., None]).max() < 6
    elif mode == "1":
        assert set(np.unique(image)) <= {*range(6), *range(250, 256)}
        assert np.array_equal(image[..., 0] > 127, RAMP > 0.5)
    else:
        assert is_ramp(image, 6 if kind == "JPEG" else 2)


# --- every bit depth and colour type of PNG, written by hand

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def png(depth, colour, share, extra=b""):
    """A PNG of [H, W] shares of white, opaque where it has a say in that."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    most = 2**depth - 1
    sample = np.repeat(
        (most * share).round().astype(int)[..., None], CHANNELS[colour], 2
    )
    if colour in (GREY_ALPHA, RGBA):
        sample[..., -1] = most
    rows = sample.reshape(len(share), -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth)[::-1]) & 1
        packed = [np.packbits(row.ravel()).tobytes() for row in bits]
    height, width = share.shape
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head)]
    if colour == PALETTE:
        grey = (255 * np.arange(most + 1) / most).round().astype(np.uint8)
        parts.append(chunk(b"PLTE", np.repeat(grey, 3).tobytes()))
    if extra:
        parts.append(chunk(b"tRNS", extra))
    return b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("depth", "colour"),
    [
        *((depth, GREY) for depth in (1, 2, 4, 8, 16)),
        *((depth, PALETTE) for depth in (1, 2, 4, 8)),
        *((depth, colour) for depth in (8, 16) for colour in (RGB, GREY_ALPHA, RGBA)),
    ],
)
def test_depths_of_png(tmp_path, depth, colour):
    image = read(tmp_path, png(depth, colour, RAMP))
    # Half a step of the file's own.
    assert is_ramp(image, 2 + 255 / (2**depth - 1) / 2)
    assert len(np.unique(image)) == min(2**depth, SIDE)


def test_transparent_pixels_lie_on_white(tmp_path):
    """Black ink on nothing stays a drawing."""
    ink = np.zeros((SIDE, SIDE, 4), np.uint8)
    ink[:, 8:, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(ink, "RGBA").save(buffer, "PNG")
    image = read(tmp_path, buffer.getvalue())
    assert (image[:, :8] == 255).all() and (image[:, 8:] == 0).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_lies_on_white(tmp_path, depth):
    content = png(depth, GREY, RAMP > 0.5, extra=struct.pack(">H", 0))
    assert (read(tmp_path, content) == 255).all()


# --- numbers of TIFF, written by hand

UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(array, bits, sample_format, photometric=1):
    """A grey TIFF of one strip; 12-bit numbers are packed."""
    if bits == 12:
        spread = (array.reshape(-1)[:, None] >> np.arange(12)[::-1]) & 1
        data = np.packbits(spread.ravel()).tobytes()
    else:
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    height, width = array.shape
    entries = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, photometric)),
        *((273, 8), (277, 1), (278, height), (279, len(data)), (339, sample_format)),
    ]
    folder = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    folder = struct.pack("<H", len(entries)) + folder + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + folder


@pytest.mark.parametrize(
    ("kind", "bits", "white", "photometric"),
    [
        (np.uint8, 8, 255, 1),
        (np.uint16, 12, 4095, 1),
        (np.uint16, 16, 65535, 1),
        (np.uint16, 16, 65535, 0),
        (np.float32, 32, 1, 1),
        (np.float32, 32, 1, 0),
    ],
)
def test_numbers_of_tiff(tmp_path, kind, bits, white, photometric):
    array = white * (RAMP if photometric else 1 - RAMP)
    array = array if kind == np.float32 else array.round()
    sample_format = FLOAT if kind == np.float32 else UNSIGNED
    content = tiff(array.astype(kind), bits, sample_format, photometric)
    assert is_ramp(read(tmp_path, content, "0.tiff"))


@pytest.mark.parametrize(
    ("array", "bits", "sample_format", "expected"),
    [
        (255 * RAMP.astype(np.float32), 32, FLOAT, "values 0..255 of mode F: must be"),
        (
            RAMP.astype(np.float32) - 1,
            32,
            FLOAT,
            "values -1..0 of mode F: must be 0..1",
        ),
        (np.full_like(RAMP, np.nan, np.float32), 32, FLOAT, "values nan..nan"),
        ((127 * RAMP).astype(np.int8), 8, SIGNED, "signed integers: must be unsigned"),
        ((9 * RAMP).astype(np.int16), 16, SIGNED, "signed integers: must be unsigned"),
        ((9 * RAMP).astype(np.uint32), 32, UNSIGNED, "range is not known"),
        ((9 * RAMP).astype(np.int32), 32, SIGNED, "signed integers: must be unsigned"),
    ],
)
def test_numbers_without_a_white_are_refused(
    tmp_path, array, bits, sample_format, expected
):
    with pytest.raises(errors.DataError) as error:
        read(tmp_path, tiff(array, bits, sample_format), "0.tif")
    assert f"tif: no image: {expected}" in str(error.value).replace(
        "mode I of TIFF: its ", ""
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("most", [255, 1000, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_ranges_of_pgm_and_ppm(tmp_path, kind, most):
    sample = (most * RAMP).round().astype(">u2" if most > 255 else np.uint8)
    sample = np.repeat(sample[..., None], 3, 2) if kind == "P6" else sample
    content = f"{kind} {SIDE} {SIDE} {most}\n".encode() + sample.tobytes()
    assert is_ramp(read(tmp_path, content, "0.ppm"))
