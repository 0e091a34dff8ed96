"""Readers of the data sets, one function each: from files to arrays."""

import io
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tqdm

from mosaic_jax.core import errors
from mosaic_jax.data import formats, images, limits
from mosaic_jax.data.archives import Archive, members, read_members, reading
from mosaic_jax.data.dataset import Arrays, Size, resize

FASHION_MNIST_FOLDERS = (pathlib.Path("/usr/share/datasets/fashion-mnist"),)

Files = dict[str, Archive]


def _files(url: str, sha256: dict[str, str], decode=None) -> Files:
    return {name: Archive(name, url, digest, decode) for name, digest in sha256.items()}


# Digests are those of the decompressed files, which some packages compress again.
FASHION_MNIST = _files(
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    {
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
    },
    formats.gunzip_idx,
)
MNIST = _files(
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    {
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    },
)
CIFAR10 = Archive(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR100 = Archive(
    "cifar-100-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
SVHN = _files(
    "http://ufldl.stanford.edu/housenumbers/",
    {
        "train_32x32.mat": (
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
        ),
        "test_32x32.mat": (
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"
        ),
    },
)
FOOD101 = Archive(
    "food-101.tar.gz",
    "http://data.vision.ee.ethz.ch/cvl/",
    "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
)


def digits(directory: pathlib.Path) -> Arrays:
    """The 1,797 digits (8 x 8) in scikit-learn; a fixed fifth is the test set."""
    del directory
    from sklearn import datasets

    pixels, label = map(np.asarray, datasets.load_digits(return_X_y=True))
    raw = pixels.reshape(-1, 8, 8, 1)
    image = resize((raw * (255 / 16)).astype(np.uint8), (16, 16))
    order = np.random.RandomState(0).permutation(len(label))
    test, train = order[:360], order[360:]
    return Arrays(image[train], label[train], image[test], label[test])


def mnist(directory: pathlib.Path) -> Arrays:
    """MNIST (LeCun et al., 1998) from idx files, resized to 32."""
    return _idx_set(MNIST, (directory / "mnist",))


def fashion_mnist(directory: pathlib.Path) -> Arrays:
    """Fashion-MNIST (Xiao et al., 2017) from idx files, resized to 32."""
    folders = (directory / "fashion_mnist", directory, *FASHION_MNIST_FOLDERS)
    return _idx_set(FASHION_MNIST, folders)


def _idx_set(files: Files, folders: Sequence[pathlib.Path]) -> Arrays:
    raw = {}
    for name, archive in files.items():
        path = archive.find(folders)
        content = archive.content(path)
        raw[name] = formats.idx(
            path, content if archive.decode else formats.gunzip_idx(path)
        )

    def image(name: str) -> np.ndarray:
        return resize(raw[name][..., None], (32, 32))

    return Arrays(
        image("train-images-idx3-ubyte.gz"),
        raw["train-labels-idx1-ubyte.gz"],
        image("t10k-images-idx3-ubyte.gz"),
        raw["t10k-labels-idx1-ubyte.gz"],
    )


def cifar10(directory: pathlib.Path) -> Arrays:
    """CIFAR-10 (Krizhevsky, 2009) from its binary archive."""
    parts = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    parts.append("cifar-10-batches-bin/test_batch.bin")
    return _cifar(CIFAR10.find(_manual(directory)), parts, label_bytes=1)


def cifar100(directory: pathlib.Path) -> Arrays:
    """CIFAR-100 (Krizhevsky, 2009), fine labels, from its binary archive."""
    parts = ["cifar-100-binary/train.bin", "cifar-100-binary/test.bin"]
    return _cifar(CIFAR100.find(_manual(directory)), parts, label_bytes=2)


def _manual(directory: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Folders of archives: this one, and that of TFDS for manual downloads."""
    return directory, directory / "downloads" / "manual"


def _cifar(path: pathlib.Path, parts: Sequence[str], *, label_bytes: int) -> Arrays:
    """Read rows of label bytes, the last of which is used, and 3 planes of 32 x 32.

    A downloaded archive's digest was verified; one that was put in place by hand is
    checked by its structure only.
    """
    row, raw = label_bytes + 3072, read_members(path, parts)
    for part, content in zip(parts, raw, strict=True):
        if len(content) % row or not content:
            name = part.rpartition("/")[2]
            raise errors.DataError(f"{path}: {name} is not a whole number of images")

    def arrays(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        rows = np.frombuffer(content, np.uint8).reshape(-1, row)
        image = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(image), rows[:, label_bytes - 1]

    return Arrays(*arrays(b"".join(raw[:-1])), *arrays(raw[-1]))


def svhn(directory: pathlib.Path) -> Arrays:
    """SVHN (Netzer et al., 2011), cropped digits, train and test, from MATLAB files."""
    import scipy.io

    found = []
    for archive in SVHN.values():
        path = archive.find((directory / "svhn", directory))
        # On a damaged file SciPy's reader may crash the process; this verifies it.
        content = archive.content(path)
        with reading(path):
            raw = scipy.io.loadmat(io.BytesIO(content))
            image, label = raw["X"].transpose(3, 0, 1, 2), raw["y"].reshape(-1)
        # The files give digit 0 the label 10.
        found += [np.ascontiguousarray(image), label % 10]
    return Arrays(*found)


def tiny_imagenet(directory: pathlib.Path) -> Arrays:
    """Tiny-ImageNet (Stanford CS231n) from its folder or zip, resized to 32.

    The labelled validation images are the test set.
    """
    folder, archive = "tiny-imagenet-200", "tiny-imagenet-200.zip"
    source = next(
        (p for p in (directory / folder, directory / archive) if p.exists()), None
    )
    if source is None:
        raise errors.DataError(
            f"{directory / folder} is missing: put the folder {folder} or the file"
            f" {archive} (from http://cs231n.stanford.edu) into {directory.resolve()}"
        )
    classes, annotations = _texts(
        source, f"{folder}/wnids.txt", f"{folder}/val/val_annotations.txt"
    )
    number = _numbered(source, classes.split())
    rows = [row.split("\t")[:2] for row in annotations.splitlines() if "\t" in row]
    number_of = {name: number(wnid) for name, wnid in rows}

    def label(name: str) -> tuple[str, int] | None:
        parts = name.split("/")
        if len(parts) == 5 and parts[1] == "train":
            return "train", number(parts[2])
        if len(parts) == 4 and parts[1] == "val" and parts[3] in number_of:
            return "test", number_of[parts[3]]
        return None

    return _decoded(source, label, size=(32, 32))


def food101(directory: pathlib.Path) -> Arrays:
    """Food-101 (Bossard et al., 2014) from its folder or archive, resized to 32."""
    folder = directory / "food-101"
    source = folder if folder.is_dir() else FOOD101.find((directory,))
    classes, train, test = _texts(
        source, *(f"food-101/meta/{name}.txt" for name in ("classes", "train", "test"))
    )
    number = _numbered(source, classes.split())
    part_of = {
        f"food-101/images/{row}.jpg": (part, number(row.partition("/")[0]))
        for part, rows in (("train", train), ("test", test))
        for row in rows.split()
    }
    return _decoded(source, part_of.get, size=(32, 32))


def _entries(
    source: pathlib.Path, wanted: Callable[[str], bool]
) -> Iterable[tuple[str, bytes]]:
    """Names and contents of the `wanted` files of a folder or an archive.

    Names begin with that of the top folder.
    """
    if not source.is_dir():
        yield from members(source, wanted)
        return
    for path in sorted(source.glob("**/*")):
        name = path.relative_to(source.parent).as_posix()
        if wanted(name) and path.is_file():
            yield name, limits.read(path)


def _texts(source: pathlib.Path, *names: str) -> list[str]:
    """Contents of the text files `names` of a folder or an archive."""
    found = dict(_entries(source, lambda name: name in names))
    for name in names:
        if name not in found:
            raise errors.DataError(f"{source}: has no {name}")
    # A damaged name is unknown, which is reported where it is looked up.
    return [found[name].decode(errors="replace") for name in names]


def _numbered(source: pathlib.Path, classes: Sequence[str]) -> Callable[[str], int]:
    """A function from the name of a class to its number, in the order of names."""
    numbers = {name: i for i, name in enumerate(sorted(classes))}

    def number(name: str) -> int:
        if name not in numbers:
            raise errors.DataError(f"{source}: lists no class {name[:40]!r}")
        return numbers[name]

    return number


def _decoded(
    source: pathlib.Path,
    label: Callable[[str], tuple[str, int] | None],
    *,
    size: Size,
) -> Arrays:
    """Decode RGB images, in the order of their names.

    `label(name)` tells whether a file is for "train" or "test", and its class; None: it
    is not read.
    """
    names: list[str] = []
    places: list[tuple[str, int]] = []

    def entries() -> Iterable[tuple[str, bytes]]:
        for name, content in _entries(source, lambda n: label(n) is not None):
            if place := label(name):
                names.append(name)
                places.append(place)
                yield name, content

    stream = images.decode_all(entries(), size, "RGB")
    decoded = list(tqdm.tqdm(stream, source.name, disable=None))
    found = {"train": ([], []), "test": ([], [])}
    for i in np.argsort(names, kind="stable"):
        part, number = places[i]
        found[part][0].append(decoded[i])
        found[part][1].append(number)
    for part, (image, _) in found.items():
        if not image:
            raise errors.DataError(f"{source}: has no {part} images")
    return Arrays(
        *(
            array
            for image, number in found.values()
            for array in (np.stack(image), np.array(number))
        )
    )
