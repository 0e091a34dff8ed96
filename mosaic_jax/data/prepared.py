"""Data sets that TensorFlow Datasets prepared, read without TensorFlow."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm

from mosaic_jax.core import errors
from mosaic_jax.data.dataset import (
    Arrays,
    Info,
    Size,
    fit,
    fit_each,
    nearest_size,
)
from mosaic_jax.data.stored import StoredImages

# Images that a thread decodes one after the other.
_AT_ONCE = 64


def find(directory: pathlib.Path, name: str) -> pathlib.Path | None:
    """Folder of the latest version of a data set that TFDS prepared, or None."""
    found = sorted((directory / name).glob("**/dataset_info.json"))
    return found[-1].parent if found else None


def read(folder: pathlib.Path, info: Info) -> Arrays:
    """Read a data set whose properties are known.

    TensorFlow is needed unless it was prepared in the format ArrayRecord.

    Raises:
      DataError: it is needed and not there.
    """
    train, test, _ = _raw(folder)
    return _fitted(train, test, info.size, info.channels)


def _fitted(train: Any, test: Any, size: Size, channels: int) -> Arrays:
    """Images and classes of both sets as arrays, [N, *size, channels] and [N]."""
    return Arrays(
        fit(train[0], size, channels),
        train[1],
        fit(test[0], size, channels),
        test[1],
    )


def read_any(
    directory: pathlib.Path,
    name: str,
    *,
    size: Size | None = None,
    column: str = "",
    in_memory: bool = True,
) -> Arrays:
    """Read any data set of images with one class each.

    Args:
      directory: where TFDS prepared it.
      name: of the data set, as of TFDS: NAME or NAME/CONFIG.
      size: height and width that images are resized to; None: squares of 16, 32 or 64
        pixels, whichever is nearest to the median of their sides.
      column: the feature with the group of each training image; "": none.
      in_memory: False: training images stay in the files, as `StoredImages`.

    Raises:
      DataError: it is not prepared, is not of that kind, or TensorFlow is needed and
        not there; the message says what to do. Or images that stay in the files would
        have to be resized all alike.
    """
    folder = find(directory, name)
    if folder is None:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': not prepared in {directory.resolve()}: must"
            ' be, where TensorFlow is installed, by python -c "import'
            f" tensorflow_datasets as t; t.builder({name!r}, data_dir='{directory}',"
            " file_format='array_record').download_and_prepare()\""
        )
    if not in_memory:
        return _in_files(folder, name, size, column)
    train, test, group = _raw(folder, column)
    shapes = [image.shape for image in (*train[0], *test[0])]
    if not train[0] or not test[0]:
        shapes = []
    size, channels = _common(name, shapes, size)
    arrays = _fitted(train, test, size, channels)
    return dataclasses.replace(arrays, train_group=group)


def _common(
    name: str, shapes: Sequence[tuple[int, ...]], size: Size | None
) -> tuple[Size, int]:
    """Size and channels of all images, whose own `shapes` these are.

    Raises:
      DataError: there are no images, or they are not of 1 or 3 channels.
    """
    if {len(shape) for shape in shapes} != {3}:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': must have images for training and for testing"
        )
    depths = {shape[-1] for shape in shapes}
    if not depths <= {1, 3}:
        raise errors.DataError(
            f"data.name = 'tfds:{name}': images of {max(depths)} channels: must be of 1"
            " or 3"
        )
    sides = [(shape[0] * shape[1]) ** 0.5 for shape in shapes]
    return size or nearest_size(float(np.median(sides))), max(depths)


def _in_files(
    folder: pathlib.Path, name: str, size: Size | None, column: str
) -> Arrays:
    """`read_any`, whose training images stay in the files."""
    prepared = _opened(folder, column)
    if prepared.file_format != "array_record":
        raise errors.DataError(
            f"data.in_memory = False: must be True for data.name = 'tfds:{name}', which"
            f" is prepared as {prepared.file_format}, not array_record"
        )
    (label, group), images = prepared.classes(), prepared.reader()
    shapes = prepared.shapes(images, len(label))
    test_image, test_label, _ = prepared.of_split(prepared.splits[1])
    every = [*shapes, *(image.shape for image in test_image)]
    size, channels = _common(name, every if shapes and test_image else [], size)
    alike, own = len(set(shapes)) == 1, shapes[0][:2]
    if alike and own != tuple(size):
        raise errors.DataError(
            f"data.in_memory = False: must be True for data.size = {size}, as images of"
            f" data.name = 'tfds:{name}' would be resized; or data.size must be {own}"
        )
    fitted = fit if alike else fit_each
    pool = futures.ThreadPoolExecutor(os.cpu_count())

    def read(numbers: np.ndarray) -> np.ndarray:
        parts = np.array_split(numbers, -(-len(numbers) // _AT_ONCE))
        decoded = pool.map(lambda part: fitted(images(part), size, channels), parts)
        return np.concatenate(list(decoded))

    return Arrays(
        StoredImages(read, np.arange(len(label)), (*size, channels)),
        label,
        fit(test_image, size, channels),
        test_label,
        group,
    )


def _raw(folder: pathlib.Path, column: str = "") -> tuple[Any, Any, np.ndarray | None]:
    """Images [H, W, D], of any size, and classes [N] for training and for testing.

    The last is the `column` of the training images, [N]; None if that is "".
    """
    prepared = _opened(folder, column)
    (image, label, group), test = map(prepared.of_split, prepared.splits)
    return (image, label), test[:2], group


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A data set in a folder.

    Attributes:
      builder: of TFDS, which declares it loosely itself.
      keys: features with the image and its class, and with its group if it is asked
        for.
      splits: names of the sets for training and for testing.
    """

    builder: Any
    keys: tuple[str, ...]
    splits: tuple[str, str]

    @property
    def file_format(self) -> str:
        """As it was prepared."""
        return self.builder.info.file_format.value

    def of_split(
        self, split: str
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
        """Images [H, W, D] of any size, classes [N] and groups [N], None if no such."""
        image, seen = [], []
        for row in tqdm.tqdm(self._rows(split), split, disable=None):
            image.append(np.asarray(row[self.keys[0]]))
            seen.append({key: row[key] for key in self.keys[1:]})
        return image, *self._columns(seen)

    def classes(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Classes [N] and groups [N] for training; no image is decoded."""
        import tensorflow_datasets as tfds

        skipped = {self.keys[0]: tfds.decode.SkipDecoding()}
        rows = self.builder.as_data_source(self.splits[0], decoders=skipped)
        bar = tqdm.tqdm(rows, "classes", disable=None)
        return self._columns([{key: row[key] for key in self.keys[1:]} for row in bar])

    def reader(self) -> Callable[[np.ndarray], list[np.ndarray]]:
        """From numbers [n] to these training images, [H, W, D] of any size."""
        source = self.builder.as_data_source(self.splits[0])

        def read(numbers: np.ndarray) -> list[np.ndarray]:
            rows = source.__getitems__(numbers.tolist())
            return [np.asarray(row[self.keys[0]]) for row in rows]

        return read

    def shapes(
        self, read: Callable[[np.ndarray], list[np.ndarray]], count: int
    ) -> list[tuple[int, ...]]:
        """Shapes of the training images, of which a few are in memory at a time.

        None is read where they are declared to be of one shape.

        Args:
          read: the result of `reader`.
          count: of the images.

        Raises:
          DataError: they are not uint8.
        """
        feature, found = self.builder.info.features[self.keys[0]], []
        if feature.np_dtype == np.uint8 and None not in feature.shape:
            return [tuple(feature.shape)] * count
        for first in tqdm.trange(0, count, _AT_ONCE, desc="sizes", disable=None):
            for image in read(np.arange(first, min(first + _AT_ONCE, count))):
                if image.dtype != np.uint8:
                    raise errors.DataError(
                        f"images of type {image.dtype}: must be uint8"
                    )
                found.append(image.shape)
        return found

    def _rows(self, split: str) -> Iterable[Any]:
        import tensorflow_datasets as tfds

        if self.file_format == "array_record":
            return self.builder.as_data_source(split)
        try:
            return tfds.as_numpy(self.builder.as_dataset(split=split))
        except ImportError as error:
            raise errors.DataError(
                f"{self.builder.data_dir}: prepared as {self.file_format}: must be"
                " array_record where TensorFlow is not installed (prepare it with"
                " file_format='array_record')"
            ) from error

    def _columns(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        label, *group = self.keys[1:]
        classes = np.array([int(row[label]) for row in rows])
        if not group:
            return classes, None
        return classes, np.array([_text(row[group[0]]) for row in rows])


def _opened(folder: pathlib.Path, column: str) -> _Prepared:
    """The data set in a folder.

    Raises:
      DataError: it is not one of images with one class each, or has no such column.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(str(folder))
    keys = builder.info.supervised_keys or ("image", "label")
    wanted = (*keys, *([column] if column else []))
    splits = ("train", "test" if "test" in builder.info.splits else "validation")
    missing = [
        *(f"the feature {key!r}" for key in wanted if key not in builder.info.features),
        *(f"the split {name!r}" for name in splits if name not in builder.info.splits),
    ]
    if missing or len(keys) != 2:
        raise errors.DataError(
            f"{folder}: must be a set of images with one class each:"
            f" {', '.join(missing) or keys}: not there"
        )
    return _Prepared(builder, wanted, splits)


def _text(value: Any) -> Any:
    """Text as such: TFDS has it as bytes."""
    return value.decode() if isinstance(value, bytes) else value
