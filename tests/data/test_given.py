"""Data sets of arrays that a user has at hand."""

import numpy as np
import pytest
from PIL import Image

from mosaic_jax import data
from mosaic_jax.core import errors
from mosaic_jax.data import dataset, sources

GREY = np.random.RandomState(0).randint(0, 256, (50, 16, 16)).astype(np.uint8)
LABEL = np.arange(50) % 5


def test_bytes_and_floats_are_the_same_images():
    whole = data.arrays(GREY, LABEL, GREY[:5], LABEL[:5])
    assert whole.train_image.shape == (50, 16, 16, 1)
    np.testing.assert_array_equal(whole.train_image[..., 0], GREY)
    for same in (GREY / 255, (GREY / 255).astype(np.float32)):
        found = data.arrays(same, LABEL, same[:5], LABEL[:5, None])
        np.testing.assert_array_equal(found.train_image, whole.train_image)
        np.testing.assert_array_equal(found.test_label, whole.test_label)


def test_a_fifth_of_each_class_is_held_out():
    found = data.arrays(GREY, LABEL)
    assert np.bincount(found.test_label).tolist() == [2] * 5
    assert len(found.train_label) == 40


def test_other_sizes_become_squares():
    found = data.arrays(np.zeros((10, 28, 30, 3)), np.arange(10) % 2)
    assert found.train_image.shape == (8, 32, 32, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            (GREY / 127.5 - 1, LABEL),
            r"x_train: images of float64, -1.0..1.0: must be",
        ),
        (
            (GREY * np.nan, LABEL),
            r"x_train: images of float64, nan..nan: must be",
        ),
        ((GREY.astype(int), LABEL), r"x_train: images of int64, 0..255: must be uint8"),
        ((GREY[0], LABEL), r"x_train: images of shape \(16, 16\): must be \[N, H, W\]"),
        ((GREY[..., :0], LABEL), r"x_train: images of shape .*, and not empty"),
        ((GREY, LABEL[:9]), r"y_train: of shape \(9,\): must be \[50\], one for each"),
        ((GREY, LABEL / 2), r"train labels of type float64"),
        ((GREY, LABEL.astype(str)), r"train labels of type <U.*: must be integers"),
        ((GREY, LABEL, GREY), r"x_test, y_test: must both be given or neither"),
        (
            (GREY, LABEL, np.zeros((4, 32, 32)), LABEL[:4]),
            r"x_test: images \(32, 32, 1\): must be \(16, 16, 1\)",
        ),
    ],
)
def test_what_is_refused(given, told):
    with pytest.raises(errors.DataError, match=told):
        data.arrays(*given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_any_set_that_tfds_prepared(tmp_path):
    """Images of several sizes under other names; its held-out split is a validation."""
    import tensorflow_datasets as tfds

    image = [np.full((20 + i, 30, 1), 40 * i, np.uint8) for i in range(5)]

    class Leaves(tfds.core.GeneratorBasedBuilder):
        """A set that the library does not know."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "photo": tfds.features.Tensor(shape=(None, 30, 1), dtype=np.uint8),
                "kind": tfds.features.ClassLabel(num_classes=3),
                "finder": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("photo", "kind"),
            )

        def _split_generators(self, _):
            return {"train": self._rows(0, 3), "validation": self._rows(3, 5)}

        def _generate_examples(self, *_):
            return iter(())

        def _rows(self, first, end):
            for i in range(first, end):
                yield i, {"photo": image[i], "kind": i % 3, "finder": f"finder {i}"}

    told = r"data.name = 'tfds:leaves': not prepared in .*: must be, where TensorFlow"
    with pytest.raises(errors.DataError, match=told):
        sources.load("tfds:leaves", tmp_path)
    Leaves(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info, found = sources.load("tfds:leaves", tmp_path)
    assert (info.image_shape, info.num_classes) == ((32, 32, 1), 3)
    order = np.argsort(found.train_label)
    assert found.train_image[order].mean((1, 2, 3)).tolist() == [0, 40, 80]
    assert sorted(found.test_label) == [0, 1]
    same = data.tfds("leaves", tmp_path)
    np.testing.assert_array_equal(same.train_image, found.train_image)
    assert same.train_group is None
    other = data.tfds("leaves", tmp_path, size=(20, 30), column="finder")
    assert other.train_image.shape == (3, 20, 30, 1)
    whose = {0: "finder 0", 1: "finder 1", 2: "finder 2"}
    assert other.train_group.tolist() == [whose[kind] for kind in other.train_label]
    with pytest.raises(errors.DataError, match="the feature 'findr'"):
        data.tfds("leaves", tmp_path, column="findr")


@pytest.mark.parametrize(
    ("image", "count", "told"),
    [
        (np.zeros((4, 16, 16), np.uint8), 4, r"type uint8, shape \(4, 16, 16\): must"),
        (np.zeros((4, 16, 16, 1)), 4, r"train images of type float64, shape"),
        (
            np.zeros((0, 16, 16, 1), np.uint8),
            0,
            r"0 train images, 0 labels: must be as",
        ),
        (
            np.zeros((4, 16, 16, 1), np.uint8),
            3,
            r"4 train images, 3 labels: must be as",
        ),
    ],
)
def test_arrays_are_checked_before_they_are_measured(image, count, told):
    label = np.zeros(count, int)
    with pytest.raises(errors.DataError, match=told):
        dataset.Arrays(image, label, image, label)


@pytest.fixture
def rows():
    datasets = pytest.importorskip("datasets")

    def made(sides, labels, mode="L", **others):
        features = {
            "id": datasets.Value("int32"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(num_classes=3),
        }
        shades = [Image.new(mode, (side, 30), 40 * i) for i, side in enumerate(sides)]
        columns = {"id": range(len(labels)), "photo": shades, "kind": labels} | others
        return datasets.Dataset.from_dict(
            {name: list(column) for name, column in columns.items()},
            features=datasets.Features({k: features[k] for k in columns}),
        )

    return made


def test_any_set_that_hugging_face_has(rows, tmp_path):
    """Images of several sizes under other names; its held-out split is a validation."""
    import datasets

    train, held_out = rows([20, 21, 22], [0, 1, 2]), rows([23, 24], [2, 0])
    sets = datasets.DatasetDict(train=train, validation=held_out)
    sets.save_to_disk(tmp_path / "leaves")
    info, found = sources.load("hf:leaves", tmp_path)
    assert (info.image_shape, info.num_classes) == ((32, 32, 1), 3)
    assert found.train_image.mean((1, 2, 3)).tolist() == [0, 40, 80]
    assert (found.train_label.tolist(), found.test_label.tolist()) == (
        [0, 1, 2],
        [2, 0],
    )
    same = data.hf("leaves", tmp_path)
    np.testing.assert_array_equal(same.train_image, found.train_image)
    info, other = sources.load("hf:leaves", tmp_path, size=(24, 16), column="id")
    assert info.image_shape == other.test_image.shape[1:] == (24, 16, 1)
    assert other.train_group.tolist() == [0, 1, 2]
    told = "data.column = 'who': must be a column of 'hf:leaves', id, photo, kind"
    with pytest.raises(errors.DataError, match=told):
        data.hf("leaves", tmp_path, column="who")
    # A test set whose classes are not told is none.
    secret = datasets.DatasetDict(
        train=train, test=rows([20, 20], [-1, -1]), valid=held_out
    )
    secret.save_to_disk(tmp_path / "secret")
    assert sources.load("hf:secret", tmp_path)[1].test_label.tolist() == [2, 0]
    # One without a test set, in colour.
    rows([40] * 10, [0, 1] * 5, "RGB").save_to_disk(tmp_path / "one")
    info, found = sources.load("hf:one", tmp_path)
    assert (info.image_shape, len(found.test_label)) == ((32, 32, 3), 2)


@pytest.mark.slow
def test_sets_of_hugging_face_that_are_no_images_with_classes(rows, tmp_path):
    import datasets

    for name, wrong, told in (
        ("unlabelled", rows([20], [-1]), "must have images, each with a class"),
        ("unknown", rows([20, 20], [0, None]), "must have images, each with a class"),
        ("blank", rows([20], [0], photo=[None]), "every row: row 0 has none"),
        (
            "plain",
            rows([20], [0]).remove_columns("photo"),
            r"the split 'train' must have a column of images \(Image\), not only id,",
        ),
        ("untrained", datasets.DatasetDict(test=rows([20], [0])), "not only 'test'"),
    ):
        wrong.save_to_disk(tmp_path / name)
        with pytest.raises(errors.DataError, match=f"data.name = 'hf:{name}'.*{told}"):
            sources.load(f"hf:{name}", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match="not in .*, as save_to_disk writes"):
        sources.load("hf:empty", tmp_path)


def test_sizes_and_groups_of_what_is_given(tmp_path):
    """Rectangles where they are asked for, and groups that go with their images."""
    image, label = np.zeros((20, 24, 40, 3), np.uint8), np.arange(20) % 2
    label_of = {f"writer {i}": label[i] for i in range(20)}
    found = data.arrays(image, label, groups=list(label_of), size=(24, 40))
    assert found.train_image.shape == (16, 24, 40, 3)
    assert [label_of[one] for one in found.train_group] == found.train_label.tolist()
    path = tmp_path / "own.npz"
    np.savez(path, x_train=image, y_train=label, writer=np.arange(20))
    assert data.npz(path).train_image.shape[1:] == (16, 16, 3)
    found = data.npz(path, size=(12, 20), column="writer")
    assert found.test_image.shape == (4, 12, 20, 3)
    assert (found.train_group % 2).tolist() == found.train_label.tolist()
    with pytest.raises(errors.DataError, match="has no array hand"):
        data.npz(path, column="hand")
    told = r"groups of int64, shape \(3,\): must be integers or text \[20\], one for"
    with pytest.raises(errors.DataError, match=told):
        data.arrays(image, label, groups=[1, 2, 3])
    for size in (28, "28", (28.0, 20.0), (28,), (0, 20), (3, 3), (2000, 20)):
        with pytest.raises(errors.DataError, match="must be None, or a height and a w"):
            data.arrays(image, label, size=size)
    np.savez(path, x_train=image, y_train=label, writer=np.arange(3))
    with pytest.raises(
        errors.DataError, match=r"'writer': of shape \(3,\) in .*own.npz"
    ):
        data.npz(path, column="writer")
    told = "data.column = 'writer': must be '' for data.name = 'digits', which has no"
    with pytest.raises(errors.DataError, match=told):
        sources.load("digits", tmp_path, column="writer")
    info, found = sources.load("digits", tmp_path, size=(12, 16))
    assert info.image_shape == found.train_image.shape[1:] == (12, 16, 1)


def test_a_folder_of_rectangles(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (30, 20), i).save(tmp_path / name / f"{i}.png")
    assert data.folder(tmp_path).train_image.shape[1:] == (32, 32, 1)
    assert data.folder(tmp_path, size=(20, 30)).train_image.shape[1:] == (20, 30, 1)
