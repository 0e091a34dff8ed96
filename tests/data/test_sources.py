"""Data sets from files of the true format."""

import dataclasses
import gzip
import hashlib
import http.server
import json
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import scipy.io

from mosaic_jax.core import errors
from mosaic_jax.data import (
    archives,
    dataset,
    federated,
    formats,
    partition,
    readers,
    sources,
)
from mosaic_jax.nn import dcgan
from tests import images, tiny


def moved(url):
    return dataclasses.replace(readers.CIFAR10, url=url)


def load(name, directory):
    return sources.load(name, directory)[1]


@pytest.mark.parametrize("folder", [".", "downloads/manual"])
def test_cifar10_archive(tmp_path, folder):
    archive = tmp_path / folder / "cifar-10-binary.tar.gz"
    image, label = images.cifar_archive(archive)
    found = load("cifar10", tmp_path)
    np.testing.assert_array_equal(found.train_image, image[:15])
    np.testing.assert_array_equal(found.train_label, label[:15])
    np.testing.assert_array_equal(found.test_image, image[15:])
    np.testing.assert_array_equal(found.test_label, label[15:])
    assert found.train_label.dtype == np.int32


def test_nothing_is_unpacked_outside(tmp_path):
    archive = tmp_path / "data" / "cifar-10-binary.tar.gz"
    images.cifar_archive(archive, extra={"../evil": b"x", "/tmp/evil_mosaic": b"x"})
    load("cifar10", tmp_path / "data")
    assert {path.name for path in tmp_path.rglob("*")} == {
        "data",
        "cache",
        "cifar-10-binary.tar.gz",
        "cifar10_32.npz",
    }


@pytest.mark.slow
def test_second_load_comes_from_the_cache(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    images.cifar_archive(archive, num=8000)
    first = load("cifar10", tmp_path)
    archive.unlink()
    start = time.monotonic()
    second = load("cifar10", tmp_path)
    assert time.monotonic() - start < 2
    np.testing.assert_array_equal(first.train_image, second.train_image)


def test_damaged_cache_is_made_again(tmp_path):
    image, _ = images.cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    load("cifar10", tmp_path)
    cache = tmp_path / "cache" / "cifar10_32.npz"
    cache.write_bytes(cache.read_bytes()[:-500])
    np.testing.assert_array_equal(load("cifar10", tmp_path).train_image, image[:15])


def test_damaged_archives_are_named(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    images.cifar_archive(archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        errors.DataError, match=r"cifar-10-binary.tar.gz: cannot be read"
    ):
        load("cifar10", tmp_path)
    archive.write_bytes(b"not a tar")
    with pytest.raises(errors.DataError, match="cannot be read"):
        load("cifar10", tmp_path)


def test_without_data_or_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CIFAR10", moved("http://localhost:9/"))
    start = time.monotonic()
    with pytest.raises(
        errors.DataError,
        match=r"put the file cifar-10-binary.tar.gz into .*" + tmp_path.name,
    ):
        load("cifar10", tmp_path)
    assert time.monotonic() - start < 10


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(
        archives.urllib.request, "urlopen", lambda *_, **__: time.sleep(3)
    )
    start = time.monotonic()
    with pytest.raises(errors.DataError, match="no answer"):
        load("cifar10", tmp_path)
    assert time.monotonic() - start < 2


def test_wrong_download_is_not_kept(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"something else")
    served = moved(tmp_path.as_uri() + "/served/")
    monkeypatch.setattr(readers, "CIFAR10", served)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(errors.DataError, match="wrong sha256"):
        load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data" / "cifar-10-binary.tar.gz").exists()


def test_digits(tmp_path):
    found = load("digits", tmp_path)
    assert found.train_image.shape == (1437, 16, 16, 1)
    assert found.test_image.shape == (360, 16, 16, 1)
    assert np.bincount(found.train_label).min() > 100


@pytest.mark.skipif(
    not any(folder.is_dir() for folder in readers.FASHION_MNIST_FOLDERS),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_real_fashion_mnist(tmp_path):
    found = load("fashion_mnist", tmp_path)
    assert found.train_image.shape == (60_000, 32, 32, 1)
    assert found.test_image.shape == (10_000, 32, 32, 1)
    assert np.bincount(found.train_label).tolist() == [6000] * 10
    assert 0.2 < found.train_image.mean() / 255 < 0.35


def test_fashion_mnist_files_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FASHION_MNIST_FOLDERS", ())
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    for name in readers.FASHION_MNIST:
        (folder / name).write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x00"))
    with pytest.raises(errors.DataError, match="wrong sha256"):
        load("fashion_mnist", tmp_path)


def test_idx_arrays(tmp_path):
    content = b"\x00\x00\x08\x02" + np.array([2, 3], ">u4").tobytes() + bytes(range(6))
    expected = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(formats.idx(tmp_path, content), expected)
    with pytest.raises(errors.DataError, match="5 bytes for an array"):
        formats.idx(tmp_path, content[:-1])
    with pytest.raises(errors.DataError, match="not an idx file"):
        formats.idx(tmp_path, b"\x1f\x8b")
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(content + b"more"))
    assert formats.gunzip_idx(path) == content + b"m"


def test_unknown_data_set():
    message = "data.name = 'cifar11': unknown, did you mean 'cifar10'"
    with pytest.raises(errors.ConfigError, match=message):
        load("cifar11", ".")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cifar10_prepared_by_tfds(tmp_path):
    import tensorflow_datasets as tfds

    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)

    class Cifar10(tfds.core.GeneratorBasedBuilder):
        """Images under the name of the real set."""

        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(32, 32, 3), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._rows(0, 3), "test": self._rows(3, 5)}

        def _generate_examples(self, *_):
            return iter(())

        def _rows(self, first, end):
            return iter(
                [(i, {"image": image[i], "label": i}) for i in range(first, end)]
            )

    builder = Cifar10(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    found = load("cifar10", tmp_path)
    order = np.argsort(found.train_label)
    np.testing.assert_array_equal(found.train_image[order], image[:3])
    assert sorted(found.test_label) == [3, 4]


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def test_mnist_of_the_true_format(tmp_path, monkeypatch):
    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (6, 28, 28))
    label = np.arange(6)
    contents = [image[:4], label[:4], image[4:], label[4:]]
    files, folder = {}, tmp_path / "mnist"
    folder.mkdir()
    for (name, archive), array in zip(readers.MNIST.items(), contents, strict=True):
        content = gzip.compress(idx_bytes(array))
        (folder / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        files[name] = dataclasses.replace(archive, sha256=sha256)
    monkeypatch.setattr(readers, "MNIST", files)
    info, found = sources.load("mnist", tmp_path)
    assert found.train_image.shape == (4, *info.image_shape) == (4, 32, 32, 1)
    assert found.test_label.tolist() == [4, 5]
    assert abs(found.train_image.mean() - image[:4].mean()) < 1


def test_cifar100_takes_the_fine_label(tmp_path):
    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    coarse, fine = np.arange(5), np.array([99, 0, 50, 7, 8])
    planes = image.transpose(0, 3, 1, 2).reshape(5, -1)
    rows = np.concatenate([coarse[:, None], fine[:, None], planes], 1).astype(np.uint8)
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
        images.add(tar, "cifar-100-binary/train.bin", rows[:3].tobytes())
        images.add(tar, "cifar-100-binary/test.bin", rows[3:].tobytes())
    info, found = sources.load("cifar100", tmp_path)
    assert info.num_classes == 100
    np.testing.assert_array_equal(found.train_image, image[:3])
    assert found.train_label.tolist() == [99, 0, 50]
    assert found.test_label.tolist() == [7, 8]


def test_svhn_digit_zero_has_label_ten(tmp_path, monkeypatch):
    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for part in ("train", "test"):
        label = np.array([[1], [10], [9], [10]], np.uint8)
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": image, "y": label})
    files = {
        name: dataclasses.replace(
            archive, sha256=hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        )
        for name, archive in readers.SVHN.items()
    }
    monkeypatch.setattr(readers, "SVHN", files)
    _, found = sources.load("svhn", tmp_path)
    np.testing.assert_array_equal(found.train_image[2], image[..., 2])
    assert found.test_label.tolist() == [1, 0, 9, 0]
    (tmp_path / "cache" / "svhn_32.npz").unlink()
    (tmp_path / "test_32x32.mat").write_bytes(b"not MATLAB")
    with pytest.raises(errors.DataError, match="test_32x32.mat: wrong sha256"):
        sources.load("svhn", tmp_path)


def unpacked(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet(tmp_path, packed):
    if packed:
        with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
            for name, content in images.tiny_imagenet_files().items():
                archive.writestr(name, content)
            # As the official one has them.
            archive.mkdir("tiny-imagenet-200/train/n00000001/images")
    else:
        unpacked(tmp_path, images.tiny_imagenet_files())
    info, found = sources.load("tiny_imagenet", tmp_path)
    assert info.num_classes == 200
    # Classes are numbered in the order of their names: n1, n2, n3.
    red = found.train_image[..., 0].mean((1, 2)).round()
    assert found.train_label.tolist() == [0, 1, 2]
    np.testing.assert_allclose(red, [100, 200, 0], atol=2)
    assert found.test_label.tolist() == [2, 0]
    assert found.test_image.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_food101(tmp_path, packed):
    if packed:
        with tarfile.open(tmp_path / "food-101.tar.gz", "w:gz") as tar:
            # The lists come last, as they may.
            for name, content in reversed(images.food101_files().items()):
                images.add(tar, name, content)
    else:
        unpacked(tmp_path, images.food101_files())
    _, found = sources.load("food101", tmp_path)
    assert found.train_label.tolist() == [0, 1]
    assert found.test_label.tolist() == [1]
    assert found.train_image[0, 16, 16].argmax() == 0
    assert found.test_image[0, 16, 16].argmax() == 2


def test_tiny_imagenet_is_missing(tmp_path):
    with pytest.raises(errors.DataError, match="put the folder tiny-imagenet-200 or"):
        sources.load("tiny_imagenet", tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_own_folder(tmp_path, split):
    for part in ("train/", "test/") if split else ("",):
        for value, name in ((200, "zebra"), (50, "ant"), (120, "bee")):
            folder = tmp_path / f"{part}{name}"
            folder.mkdir(parents=True)
            for i in range(5 if "test" in part else 10):
                (folder / f"{i}.png").write_bytes(images.png(value, 30, "L"))
            (folder / "notes.txt").write_text("no image")
    info, found = sources.load("folder", tmp_path)
    assert info.image_shape == (32, 32, 1)
    assert info.num_classes == 3
    assert np.bincount(found.train_label).tolist() == [10 if split else 8] * 3
    assert np.bincount(found.test_label).tolist() == [5 if split else 2] * 3
    # Classes in the order of their names: ant, bee, zebra.
    for k, value in enumerate((50, 120, 200)):
        assert np.all(found.train_image[found.train_label == k] == value)
    mean = found.train_image.mean() / 255
    assert info.mean[0] == pytest.approx(mean, abs=1e-4)
    assert info.augmentation == "none"


def test_own_folder_of_colour_and_size(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            mode, value = ("L", 9) if i else ("RGB", (9, 0, 0))
            (tmp_path / name / f"{i}.png").write_bytes(images.png(value, 300, mode))
    assert sources.load("folder", tmp_path)[0].image_shape == (64, 64, 3)
    (tmp_path / "a" / "5.png").write_bytes(b"broken")
    with pytest.raises(errors.DataError, match=r"a/5.png: no image"):
        sources.load("folder", tmp_path)


def test_own_folder_without_classes(tmp_path):
    with pytest.raises(errors.DataError, match="must have a sub-folder of images"):
        sources.load("folder", tmp_path)
    with pytest.raises(errors.DataError, match="no such file or folder"):
        sources.load("folder", tmp_path / "nowhere")


def test_own_arrays(tmp_path):
    path = tmp_path / "mine.npz"
    image = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8)
    np.savez(path, x_train=image, y_train=np.arange(20)[:, None] % 4)
    info, found = sources.load("npz", path)
    assert info.image_shape == (32, 32, 1)
    assert (len(found.train_label), len(found.test_label)) == (16, 4)
    assert sorted(found.test_label) == [0, 1, 2, 3]
    np.savez(path, x_train=image, y_train=np.arange(20), x_test=image)
    with pytest.raises(errors.DataError, match="both x_test and y_test or neither"):
        sources.load("npz", path)
    np.savez(path, x_train=image / 255, y_train=np.arange(20))
    with pytest.raises(errors.DataError, match="type float64: must be uint8"):
        sources.load("npz", path)
    np.savez(path, x_train=image, y_train=np.linspace(0, 1, 20))
    with pytest.raises(errors.DataError, match=r"must be integers \[20\]"):
        sources.load("npz", path)
    np.savez(path, x_train=np.array([{}]), y_train=np.arange(1))
    with pytest.raises(errors.DataError, match="type object: must be uint8"):
        sources.load("npz", path)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from a byte on where it is asked for; counts what it sends."""

    content, sent = b"", 0

    def do_GET(self):
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        part = self.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        type(self).sent += len(part)

    def log_message(self, *_):
        pass


def test_a_broken_download_goes_on(tmp_path):
    Ranges.content, Ranges.sent = bytes(range(256)) * 100, 0
    server = http.server.HTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sha256 = hashlib.sha256(Ranges.content).hexdigest()
    url = f"http://127.0.0.1:{server.server_port}/"
    archive = archives.Archive("file.bin", url, sha256)
    (tmp_path / "file.bin.partial").write_bytes(Ranges.content[:20_000])
    path = archive.find([tmp_path])
    server.shutdown()
    assert path.read_bytes() == Ranges.content
    assert Ranges.sent == len(Ranges.content) - 20_000
    assert not (tmp_path / "file.bin.partial").exists()


def test_split_of_a_run_can_be_read_again(tmp_path):
    config = tiny.study().data
    data = federated.load(config, 0)
    federated.save_split(tmp_path / "split.json", data)
    again = federated.load(
        dataclasses.replace(
            config, split="file", split_file=str(tmp_path / "split.json")
        ),
        0,
    )
    assert again.sha256 == data.sha256
    rows = [f"{c},{i}" for c, part in enumerate(data.parts) for i in part]
    (tmp_path / "split.csv").write_text("\n".join(["client,index", *rows]))
    parts = partition.read(
        tmp_path / "split.csv", num_images=len(data.clients.images.label), num_clients=3
    )
    assert partition.digest(parts) == data.sha256


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"clients": [[0, 1]]}, "has 1 clients: must be data.num_clients = 2"),
        ({"clients": [[0], []]}, "client 1 has no images"),
        ({"clients": [[0], [9]]}, "image numbers 0..9: must be 0..4"),
        ({"clients": [[0, 1], [1]]}, "image 1 is there 2 times"),
        ({"clients": [[0], [0.5]]}, "image numbers must be integers"),
        ({"parts": []}, "cannot be read: 'clients'"),
        ([], "cannot be read"),
    ],
)
def test_bad_split_files(tmp_path, content, expected):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    with pytest.raises(errors.DataError) as error:
        partition.read(path, num_images=5, num_clients=2)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_prepared_images_are_bytes():
    grey = np.full((30, 30, 1), 200, np.uint8)
    for image in (
        dataset.fit([grey, grey[1:]], (32, 24), 3),
        dataset.fit([grey], (32, 24), 3),
    ):
        assert image.shape[1:] == (32, 24, 3) and (image == 200).all()
    for wrong in ([], [grey.astype(np.uint16) * 257], [grey, grey / 255]):
        with pytest.raises(errors.DataError, match="must be uint8"):
            dataset.fit(wrong, (32, 32), 3)


def test_sizes_for_own_images():
    sizes = [dataset.nearest_size(side) for side in (8, 24, 28, 48, 49, 500)]
    assert sizes == [(side, side) for side in (16, 16, 32, 32, 64, 64)]
    assert dataset.SIDES == dcgan.IMAGE_SIZES
