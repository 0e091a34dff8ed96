"""Data sets by name: found in the data folder, or downloaded, then cached as arrays.

Archives are read in memory by member name; nothing is unpacked, nothing unpickled.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import pathlib
import tarfile
import threading

import urllib.request
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from mosaic_jax import errors

CONNECT_SECONDS = 6.0
FASHION_MNIST_FOLDERS = (pathlib.Path("/usr/share/datasets/fashion-mnist"),)
_FASHION_MNIST_URL = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
)
# sha256 of the decompressed files: packagers compress anew.
_FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
# What reading a damaged archive or cache may raise.
_UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_CIFAR10_FILE = "cifar-10-binary.tar.gz"
_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


@dataclasses.dataclass(frozen=True)
class Info:
    """What a classifier and a generator must know of a data set.

    `mean` and `std` per channel where black is 0 and white is 1.
    """

    num_classes: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, D)."""
        return (self.image_size, self.image_size, self.channels)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images uint8 [N, H, W, D] and labels int32 [N], for training and for test."""

    train_image: np.ndarray
    train_label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray


_FIELDS = tuple(field.name for field in dataclasses.fields(Arrays))

INFO = {
    "digits": Info(10, 16, 1, (0.3053,), (0.3334,), "none"),
    "fashion_mnist": Info(10, 32, 3, (0.1307,) * 3, (0.3081,) * 3, "none"),
    "cifar10": Info(
        10, 32, 3, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "crop_flip"
    ),
}


def load(name: str, directory: str | pathlib.Path) -> Arrays:
    """The data set called `name`, from the cache in `directory` when it is there.

    Raises:
      DataError: no such loader; or the files are missing and cannot be downloaded
        (says which file to put where); or a file is damaged.
    """
    if name not in INFO:
        raise errors.DataError(
            f"data.name = {name!r}: no loader yet; known: {', '.join(INFO)}"
        )
    directory = pathlib.Path(directory).expanduser()
    cache = directory / "cache" / f"{name}_{INFO[name].image_size}.npz"
    with contextlib.suppress(*_UNREADABLE, ValueError):
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return Arrays(**{field: saved[field] for field in _FIELDS})
    arrays = _LOADERS[name](directory)
    _check(name, arrays)
    _write_cache(cache, arrays)
    return arrays


def _check(name: str, arrays: Arrays) -> None:
    info = INFO[name]
    for part in ("train", "test"):
        image = getattr(arrays, f"{part}_image")
        label = getattr(arrays, f"{part}_label")
        if image.shape[1:] != info.image_shape or len(image) != len(label):
            raise errors.DataError(
                f"{name}: {part} images of shape {image.shape}: must be"
                f" [{len(label)}, {info.image_size}, {info.image_size}, {info.channels}]"
            )
        if label.min() < 0 or label.max() >= info.num_classes:
            raise errors.DataError(
                f"{name}: {part} labels {label.min()}..{label.max()}: must be"
                f" 0..{info.num_classes - 1}"
            )


def _write_cache(path: pathlib.Path, arrays: Arrays) -> None:
    # Without a writable data folder the set is simply prepared again next time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{field: getattr(arrays, field) for field in _FIELDS})
        partial.replace(path)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of uint8 [N, H, W, D] to [N, size, size, D]."""
    chunks = []
    for start in range(0, len(image), 10_000):
        chunk = image[start : start + 10_000].astype(np.float32)
        shape = (len(chunk), size, size, image.shape[-1])
        chunks.append(np.asarray(jax.image.resize(chunk, shape, "bilinear")))
    return np.concatenate(chunks).round().clip(0, 255).astype(np.uint8)


def _digits(directory: pathlib.Path) -> Arrays:
    """1,797 real 8 x 8 digits that scikit-learn ships; a fixed fifth is the test set."""
    del directory
    from sklearn import datasets

    raw = datasets.load_digits()
    image = resize((raw.images[..., None] * (255 / 16)).astype(np.uint8), 16)
    label = raw.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(label))
    test, train = order[:360], order[360:]
    return Arrays(image[train], label[train], image[test], label[test])


def _fashion_mnist(directory: pathlib.Path) -> Arrays:
    """Fashion-MNIST (Xiao et al., 2017) from idx files, resized to 32, grey to RGB."""
    folders = (directory / "fashion_mnist", directory, *FASHION_MNIST_FOLDERS)
    raw = {}
    for name, sha256 in _FASHION_MNIST_FILES.items():
        path = next((f / name for f in folders if (f / name).is_file()), None)
        if path is None:
            path = directory / "fashion_mnist" / name
            _download(_FASHION_MNIST_URL + name, path, sha256, gzip.decompress)
        raw[name] = _idx(path, _verified(path, sha256, gzip.decompress))

    def images(name: str) -> np.ndarray:
        return np.repeat(resize(raw[name][..., None], 32), 3, axis=-1)

    return Arrays(
        images("train-images-idx3-ubyte.gz"),
        raw["train-labels-idx1-ubyte.gz"].astype(np.int32),
        images("t10k-images-idx3-ubyte.gz"),
        raw["t10k-labels-idx1-ubyte.gz"].astype(np.int32),
    )


def _idx(path: pathlib.Path, content: bytes) -> np.ndarray:
    """Array of an idx file: magic (0, 0, 8 = uint8, rank), big-endian sizes, bytes."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise errors.DataError(f"{path}: not an idx file of bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, 4)
    body = np.frombuffer(content, np.uint8, -1, 4 + 4 * rank)
    if body.size != shape.prod():
        raise errors.DataError(f"{path}: {body.size} bytes for an array of {shape}")
    return body.reshape(shape)


def _cifar10(directory: pathlib.Path) -> Arrays:
    """CIFAR-10 (Krizhevsky, 2009): official binary archive, or a TFDS ArrayRecord set."""
    archive = directory / _CIFAR10_FILE
    manual = directory / "downloads" / "manual" / _CIFAR10_FILE
    if not archive.is_file() and manual.is_file():
        archive = manual
    if not archive.is_file():
        prepared = sorted(directory.glob("cifar10/*/dataset_info.json"))
        if prepared:
            return _from_tfds(prepared[-1].parent)
        _download(_CIFAR10_URL + _CIFAR10_FILE, archive, _CIFAR10_SHA256)
    return read_cifar10(archive)


def read_cifar10(archive: pathlib.Path) -> Arrays:
    """Arrays of an archive in CIFAR-10's binary format (label byte, 3 planes of 32 x 32).

    The whole file's checksum is verified where it is downloaded; an archive that was
    put in place by hand is checked by its structure.
    """
    parts = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    try:
        with tarfile.open(archive) as tar:
            raw = [_member(tar, f"cifar-10-batches-bin/{part}") for part in parts]
    except _UNREADABLE as error:
        raise errors.DataError(f"{archive}: cannot be read: {error}") from error
    for part, content in zip(parts, raw, strict=True):
        if len(content) % 3073 or not content:
            raise errors.DataError(f"{archive}: {part} is not a whole number of images")

    def arrays(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        image = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(image), rows[:, 0].astype(np.int32)

    return Arrays(*arrays(b"".join(raw[:5])), *arrays(raw[5]))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(f"{name} is not a file")
    return stream.read()


def _from_tfds(folder: pathlib.Path) -> Arrays:
    """Arrays of a set that TFDS prepared with file_format="array_record"."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise errors.DataError(
            f"{folder}: prepared as {file_format}: must be array_record (prepare it with"
            " file_format='array_record')"
        )

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = list(tqdm.tqdm(builder.as_data_source(split), split, disable=None))
        image = np.stack([row["image"] for row in rows])
        return image, np.array([row["label"] for row in rows], np.int32)

    return Arrays(*arrays("train"), *arrays("test"))


_LOADERS: dict[str, Callable[[pathlib.Path], Arrays]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
}


def _identity(content: bytes) -> bytes:
    return content


def _verified(
    path: pathlib.Path, sha256: str, decode: Callable[[bytes], bytes] = _identity
) -> bytes:
    """Decoded content of `path`, whose sha256 must match."""
    try:
        content = decode(path.read_bytes())
    except _UNREADABLE as error:
        raise errors.DataError(f"{path}: cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise errors.DataError(f"{path}: wrong sha256: delete the file and try again")
    return content


def _download(
    url: str,
    path: pathlib.Path,
    sha256: str,
    decode: Callable[[bytes], bytes] = _identity,
) -> None:
    """Fetch `url` to `path` with a progress bar; complain clearly without a network."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(_connect(url)) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            bar = tqdm.tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, disable=None
            )
            with bar:
                while block := response.read(1 << 20):
                    bar.update(file.write(block))
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise errors.DataError(
            f"{path} is missing and {url} cannot be fetched ({reason}): put the file"
            f" {path.name} into {path.parent.resolve()}"
        ) from error
    _verified(partial, sha256, decode)
    partial.replace(path)


def _connect(url: str):
    """Open `url` within `CONNECT_SECONDS`; name look-ups ignore urlopen's own limit."""
    answer = []

    def open_url() -> None:
        try:
            answer.append(urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=open_url, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    result = answer[0] if answer else TimeoutError("no answer")
    if isinstance(result, OSError):
        raise result
    return result
