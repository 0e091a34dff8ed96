"""Data sets of images as the library `datasets` of Hugging Face has them."""

import pathlib
from typing import Any

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.data import images, own
from mosaic_jax.data.dataset import Arrays, nearest_size

# Names of the set that is tested on, the first that is there.
_TEST = ("test", "validation", "valid")


def read_any(directory: pathlib.Path, name: str) -> Arrays:
    """Read a data set of images with one class each; resized to what fits best.

    Its first column of images counts, and its first column of classes (`ClassLabel`).
    Where it has no test set, a fixed fifth of each class is held out.

    Args:
      directory: where `name` lies, as `save_to_disk` wrote it, or where what is
        downloaded is kept.
      name: of the data set: a folder in `directory`, or "OWNER/REPOSITORY" of the hub.

    Raises:
      ConfigError: `datasets` is not installed.
      DataError: there is no such data set, or it is not of that kind.
    """
    sets = _load(directory, name)
    if "train" not in sets:
        raise errors.DataError(
            f"data.name = 'hf:{name}': must have the split 'train', not only"
            f" {', '.join(map(repr, sets))}"
        )
    test = next((part for part in _TEST if part in sets), "")
    parts = [_files(sets[part], name, part) for part in ("train", test) if part]
    contents = [content for part, _ in parts for content in part]
    files = [(f"hf:{name}: image {i}", one) for i, one in enumerate(contents)]
    sides, grey = zip(*(images.look_at(*file) for file in files), strict=True)
    size, mode = nearest_size(float(np.median(sides))), "L" if all(grey) else "RGB"
    image = np.stack(list(images.decode_all(files, size, mode)))
    label = [classes for _, classes in parts]
    count = len(label[0])
    if not test:
        return own.with_test_set(image, label[0])
    return Arrays(image[:count], label[0], image[count:], label[1])


def _load(directory: pathlib.Path, name: str) -> Any:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise errors.ConfigError(
            f"data.name = 'hf:{name}': needs the package datasets: pip install datasets"
        ) from error
    folder = directory / name
    try:
        if folder.exists():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(name, cache_dir=str(directory / "hub"))
    except Exception as error:  # the library, and what it is built of, raise many kinds
        raise errors.DataError(
            f"data.name = 'hf:{name}': neither in {directory.resolve()}, as"
            f" save_to_disk writes it, nor to be had: {errors.reason(error)}"
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else found


def _files(rows: Any, name: str, part: str) -> tuple[list[bytes], np.ndarray]:
    """Image files and classes [N] of one split.

    Raises:
      DataError: it has no such columns, or images without a class.
    """
    import datasets

    def column(kind: type, what: str) -> str:
        for key, feature in rows.features.items():
            if isinstance(feature, kind):
                return key
        raise errors.DataError(
            f"data.name = 'hf:{name}': the split {part!r} must have a column of {what}"
            f" ({kind.__name__}), not only {', '.join(rows.features)}"
        )

    image = column(datasets.Image, "images")
    label = np.asarray(rows[column(datasets.ClassLabel, "classes")][:])
    if not len(label) or label.min() < 0:
        raise errors.DataError(
            f"data.name = 'hf:{name}': the split {part!r} must have images, each with a"
            " class"
        )
    kept = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return [_content(row[image]) for row in kept], label.astype(np.int32)


def _content(file: dict[str, Any]) -> bytes:
    """Of an image that lies in the table, or beside it."""
    return file["bytes"] or pathlib.Path(file["path"]).read_bytes()
