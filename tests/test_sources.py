"""Data sets from files of the true format."""

import gzip
import io
import tarfile
import time

import numpy as np
import pytest

from mosaic_jax import errors
from mosaic_jax.data import sources


def cifar_archive(path, num=3, extra=None):
    """A CIFAR-10 binary archive of `num` images a file; returns images and labels."""
    np_rng = np.random.RandomState(0)
    image = np_rng.randint(0, 256, (6 * num, 32, 32, 3)).astype(np.uint8)
    label = np_rng.randint(0, 10, 6 * num)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(path, "w:gz") as tar:
        for part, name in enumerate(names):
            rows = slice(part * num, (part + 1) * num)
            planes = image[rows].transpose(0, 3, 1, 2).reshape(num, -1)
            content = np.concatenate([label[rows, None], planes], 1).astype(np.uint8)
            add(tar, f"cifar-10-batches-bin/{name}", content.tobytes())
        for name, content in (extra or {}).items():
            add(tar, name, content)
    return image, label


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("folder", [".", "downloads/manual"])
def test_cifar10_archive(tmp_path, folder):
    archive = tmp_path / folder / "cifar-10-binary.tar.gz"
    image, label = cifar_archive(archive)
    arrays = sources.load("cifar10", tmp_path)
    np.testing.assert_array_equal(arrays.train_image, image[:15])
    np.testing.assert_array_equal(arrays.train_label, label[:15])
    np.testing.assert_array_equal(arrays.test_image, image[15:])
    np.testing.assert_array_equal(arrays.test_label, label[15:])
    assert arrays.train_label.dtype == np.int32


def test_nothing_is_unpacked_outside(tmp_path):
    archive = tmp_path / "data" / "cifar-10-binary.tar.gz"
    cifar_archive(archive, extra={"../evil": b"x", "/tmp/evil_mosaic": b"x"})
    sources.load("cifar10", tmp_path / "data")
    assert {path.name for path in tmp_path.rglob("*")} == {
        "data",
        "cache",
        "cifar-10-binary.tar.gz",
        "cifar10_32.npz",
    }


def test_second_load_comes_from_the_cache(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(archive, num=8000)
    first = sources.load("cifar10", tmp_path)
    archive.unlink()
    start = time.monotonic()
    second = sources.load("cifar10", tmp_path)
    assert time.monotonic() - start < 2
    np.testing.assert_array_equal(first.train_image, second.train_image)


def test_damaged_cache_is_made_again(tmp_path):
    image, _ = cifar_archive(tmp_path / "cifar-10-binary.tar.gz")
    sources.load("cifar10", tmp_path)
    cache = tmp_path / "cache" / "cifar10_32.npz"
    cache.write_bytes(cache.read_bytes()[:-500])
    np.testing.assert_array_equal(
        sources.load("cifar10", tmp_path).train_image, image[:15]
    )


def test_damaged_archives_are_named(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        errors.DataError, match=r"cifar-10-binary.tar.gz: cannot be read"
    ):
        sources.load("cifar10", tmp_path)
    archive.write_bytes(b"not a tar")
    with pytest.raises(errors.DataError, match="cannot be read"):
        sources.load("cifar10", tmp_path)


def test_without_data_or_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CIFAR10_URL", "http://localhost:9/")
    start = time.monotonic()
    with pytest.raises(
        errors.DataError,
        match=r"put the file cifar-10-binary.tar.gz into .*" + tmp_path.name,
    ):
        sources.load("cifar10", tmp_path)
    assert time.monotonic() - start < 10


def test_a_silent_network_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(
        sources.urllib.request, "urlopen", lambda *_, **__: time.sleep(3)
    )
    start = time.monotonic()
    with pytest.raises(errors.DataError, match="no answer"):
        sources.load("cifar10", tmp_path)
    assert time.monotonic() - start < 2


def test_wrong_download_is_not_kept(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"something else")
    monkeypatch.setattr(sources, "_CIFAR10_URL", tmp_path.as_uri() + "/served/")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(errors.DataError, match="wrong sha256"):
        sources.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data" / "cifar-10-binary.tar.gz").exists()


def test_digits(tmp_path):
    arrays = sources.load("digits", tmp_path)
    assert arrays.train_image.shape == (1437, 16, 16, 1)
    assert arrays.test_image.shape == (360, 16, 16, 1)
    assert np.bincount(arrays.train_label).min() > 100


@pytest.mark.skipif(
    not any(folder.is_dir() for folder in sources.FASHION_MNIST_FOLDERS),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_real_fashion_mnist(tmp_path):
    arrays = sources.load("fashion_mnist", tmp_path)
    assert arrays.train_image.shape == (60_000, 32, 32, 3)
    assert arrays.test_image.shape == (10_000, 32, 32, 3)
    assert np.bincount(arrays.train_label).tolist() == [6000] * 10
    assert 0.2 < arrays.train_image.mean() / 255 < 0.35


def test_fashion_mnist_files_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST_FOLDERS", ())
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    for name in sources._FASHION_MNIST_FILES:
        (folder / name).write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x00"))
    with pytest.raises(errors.DataError, match="wrong sha256"):
        sources.load("fashion_mnist", tmp_path)


def test_idx_arrays(tmp_path):
    content = b"\x00\x00\x08\x02" + np.array([2, 3], ">u4").tobytes() + bytes(range(6))
    expected = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(sources._idx(tmp_path, content), expected)
    with pytest.raises(errors.DataError, match="5 bytes for an array"):
        sources._idx(tmp_path, content[:-1])
    with pytest.raises(errors.DataError, match="not an idx file"):
        sources._idx(tmp_path, b"\x1f\x8b")


def test_no_loader():
    with pytest.raises(errors.DataError, match="data.name = 'cifar100': no loader yet"):
        sources.load("cifar100", ".")


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
    arrays = sources.load("cifar10", tmp_path)
    order = np.argsort(arrays.train_label)
    np.testing.assert_array_equal(arrays.train_image[order], image[:3])
    assert sorted(arrays.test_label) == [3, 4]
