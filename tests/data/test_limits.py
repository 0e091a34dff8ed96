"""Labels and claims of sizes are looked at before numbers are cast and memory taken."""

import gzip
import io
import logging
import os
import pathlib
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.data import dataset, federated, limits, readers, sources
from tests import images, tiny

IMAGE = np.random.RandomState(0).randint(0, 256, (20, 16, 16, 3)).astype(np.uint8)
LABEL = np.arange(20) % 4


def saved(path, **changes):
    np.savez(path, **({"x_train": IMAGE, "y_train": LABEL} | changes))
    return path


# --- labels


@pytest.mark.parametrize(
    "wrong",
    [
        np.array(2**32 + 1, np.int64),
        np.array(2**63, np.uint64),
        np.array(-1, np.int8),
        np.array(10**6, np.int32),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_that_no_cast_may_meet(tmp_path, wrong, part):
    label = LABEL.astype(wrong.dtype)
    label[3] = wrong
    parts = {f"x_{part}": IMAGE, f"y_{part}": label}
    if part == "test":
        parts |= {"x_train": IMAGE, "y_train": LABEL}
    path = saved(tmp_path / "mine.npz", **parts)
    with pytest.raises(errors.DataError) as error:
        sources.load("npz", path)
    assert f"{part} labels of type {wrong.dtype}, " in str(error.value)
    assert str(wrong) in str(error.value)
    assert "must be integers 0..9999" in str(error.value)


def test_labels_of_every_integer_type_are_the_same(tmp_path):
    for kind in "bBhHiIlL":
        path = saved(tmp_path / "mine.npz", y_train=LABEL.astype(kind))
        info, found = sources.load("npz", path)
        assert found.train_label.dtype == found.test_label.dtype == np.int32
        assert np.bincount(found.train_label).tolist() == [4, 4, 4, 4]
        assert info.num_classes == 4


def test_labels_with_more_gaps_than_classes(tmp_path):
    path = saved(tmp_path / "mine.npz", y_train=LABEL * 1000)
    with pytest.raises(
        errors.DataError,
        match=r"labels up to 3000, but training images of 4 classes: must be numbered"
        r" 0\.\.3",
    ):
        sources.load("npz", path)


def test_classes_without_training_images_are_told(tmp_path, caplog):
    test_label = np.array([4, 4, 4, *np.arange(17) % 4])
    path = saved(tmp_path / "mine.npz", x_test=IMAGE, y_test=test_label)
    told = "no training image of 1 of 5 classes (4); 3 of 20 test images are of them"
    found = sources.load("npz", path)[1]
    counts = np.bincount(found.train_label, minlength=5), np.bincount(found.test_label)
    assert dataset.absent(*counts) == [told]
    config = tiny.study(data__name="npz", data__dir=str(path), data__split="iid").data
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        federated.load(config, 0)
    assert f"there is {told}" in caplog.text


def test_a_class_without_test_images_is_told(tmp_path, caplog):
    told = "no test image of 1 of 4 classes (2): accuracy says nothing about them"
    test_label = np.array([0, 1, 3, 3] * 5)
    path = saved(tmp_path / "mine.npz", x_test=IMAGE, y_test=test_label)
    config = tiny.study(data__name="npz", data__dir=str(path), data__split="iid").data
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        federated.load(config, 0)
    assert f"there is {told}" in caplog.text


def test_nothing_is_told_where_every_class_is_there(tmp_path, caplog):
    path = saved(tmp_path / "mine.npz")
    assert dataset.absent(np.ones(4), np.ones(4)) == []
    config = tiny.study(data__name="npz", data__dir=str(path), data__split="iid").data
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        federated.load(config, 0)
    assert not caplog.text


def test_a_class_that_the_split_leaves_out_is_told(tmp_path, caplog):
    path = saved(tmp_path / "mine.npz", x_test=IMAGE, y_test=LABEL)
    rows = [f"{i % 3},{i}" for i in range(20) if LABEL[i] != 2]
    split = tmp_path / "split.csv"
    split.write_text("\n".join(["client,index", *rows]))
    config = tiny.study(
        data__name="npz",
        data__dir=str(path),
        data__validation=0.0,
        data__split="file",
        data__split_file=str(split),
    ).data
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        federated.load(config, 0)
    assert "no training image of 1 of 4 classes (2); 5 of 20 test" in caplog.text


def test_test_classes_of_a_folder_are_not_left_out(tmp_path):
    """An image of a class that only the test set has counts as a mistake to come."""
    for part, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(images.png(9, 16, "L"))
    # Of other programs.
    (tmp_path / "train" / ".cache").mkdir()
    info, found = sources.load("folder", tmp_path)
    assert info.num_classes == 3
    assert found.test_label.tolist() == [0, 1, 2]


# --- memory


def peak(call):
    """Bytes that `call` held at most, besides what was there."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def many():
    image = np.random.RandomState(0).randint(0, 256, (12_000, 64, 64, 1), np.uint8)
    label = np.arange(len(image)) % 4
    return dataset.Arrays(image, label, image[:4], label[:4])


def test_a_description_copies_no_images():
    found = many()
    size = found.train_image.nbytes
    used = peak(lambda: dataset.describe(found))
    info = dataset.describe(found)
    assert used < 2 * size
    assert info.mean == (round(found.train_image.mean() / 255, 4),)
    assert info.std == (round(found.train_image.std() / 255, 4),)


def test_moments_of_every_channel_by_hand():
    image = np.array([0, 10, 255, 1, 255, 30], np.uint8).reshape(1, 1, 2, 3)
    found = dataset._moments(image)
    np.testing.assert_allclose(found[0] * 255, [0.5, 132.5, 142.5])
    np.testing.assert_allclose(found[1] * 255, [0.5, 122.5, 112.5])


def npz_that_claims(path, shape, kind="|u1"):
    """An npz whose x_train is zeros, packed to a thousandth of its size."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as file:
            file.write(head.getvalue())
            for _ in range(shape[0]):
                file.write(bytes(int(np.prod(shape[1:]))))
        label = io.BytesIO()
        np.save(label, np.arange(shape[0]) % 4)
        archive.writestr("y_train.npy", label.getvalue())
    return path


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(limits, "available", lambda: 20_000_000)


def test_an_npz_that_claims_too_much_is_not_unpacked(tmp_path, little_memory):
    path = npz_that_claims(tmp_path / "mine.npz", (30, 1000, 1000))
    assert path.stat().st_size < 100_000

    def load():
        with pytest.raises(
            errors.DataError,
            match=r"mine.npz: claims to hold 0.03 GB: must be <= 0.01 GB, half of the",
        ):
            sources.load("npz", path)

    assert peak(load) < 3_000_000


def test_a_header_that_lies_about_its_array(tmp_path):
    path = npz_that_claims(tmp_path / "mine.npz", (20, 16, 16))
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    image = parts["x_train.npy"]
    parts["x_train.npy"] = image.replace(b"(20, 16, 16)", b"(99, 99, 99)")
    with zipfile.ZipFile(path, "w") as new:
        for name, part in parts.items():
            new.writestr(name, part)
    with pytest.raises(errors.DataError, match="x_train is not as long as its header"):
        sources.load("npz", path)


def test_arrays_that_are_not_needed_are_not_read(tmp_path):
    path = saved(tmp_path / "mine.npz", other=np.zeros((3000, 3000)))
    assert peak(lambda: sources.load("npz", path)) < 3_000_000


def test_a_packed_file_that_claims_too_much(tmp_path, little_memory):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        content = bytes(30_730_000)
        images.add(tar, "cifar-10-batches-bin/data_batch_1.bin", content)
    with pytest.raises(
        errors.DataError, match=r"batch_1.bin: claims to hold 0.0307 GB"
    ):
        sources.load("cifar10", tmp_path)
    with zipfile.ZipFile(
        tmp_path / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", content)
    with pytest.raises(errors.DataError, match=r"wnids.txt: claims to hold 0.0307 GB"):
        sources.load("tiny_imagenet", tmp_path)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((60_000, 28, 28), "claims to hold 0.047 GB"), ((1, 1, 1), "wrong sha256")],
)
def test_an_idx_file_that_unpacks_to_more(
    tmp_path, monkeypatch, little_memory, shape, expected
):
    """By its header, or past it."""
    monkeypatch.setattr(readers, "FASHION_MNIST_FOLDERS", ())
    head = bytes([0, 0, 8, 3]) + np.array(shape, ">u4").tobytes()
    (tmp_path / "fashion_mnist").mkdir()
    path = tmp_path / "fashion_mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(head + bytes(40_000_000)))

    def load():
        with pytest.raises(errors.DataError, match=expected):
            sources.load("fashion_mnist", tmp_path)

    assert peak(load) < 3_000_000


def test_a_big_file_is_not_read(tmp_path, little_memory):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(images.png(9, 16))
    with (tmp_path / "b" / "0.png").open("r+b") as file:
        file.truncate(30_000_000)
    with pytest.raises(errors.DataError, match=r"b/0.png: claims to hold 0.03 GB"):
        sources.load("folder", tmp_path)


def test_free_memory_is_the_least_that_anyone_allows(tmp_path, monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < limits.available() <= total
    listing = tmp_path / "cgroup"
    listing.write_text("4:memory:/job/step\n0::/\n")
    for folder, limit, used in (("job", 1000, 900), ("job/step", 500, 100)):
        path = tmp_path / "memory" / folder
        path.mkdir(parents=True)
        (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (path / "memory.usage_in_bytes").write_text(f"{used}\n")
        (path / "memory.stat").write_text("cache 70\ntotal_inactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7\n")
    assert limits._left_to_groups(listing, tmp_path) == [450, 150]
    (tmp_path / "memory.max").write_text("107\n")
    assert limits._left_to_groups(listing, tmp_path) == [450, 150, 100]


def test_a_process_knows_its_own_limit():
    """`ulimit -v`, less what it has mapped already."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, 2 * (3 * 10**8,));"
        "from mosaic_jax.data import limits; print(limits.available())"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    assert 0 < int(found.stdout) < 3 * 10**8
