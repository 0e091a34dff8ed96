"""Data sets of images as the library `datasets` of Hugging Face has them."""

import pathlib
from typing import Any

import numpy as np

from mosaic_jax.core import errors
from mosaic_jax.data import images, own
from mosaic_jax.data.dataset import Arrays, Size, nearest_size

# What `save_to_disk` writes into the folder of several splits, and of one.
_SAVED = ("dataset_dict.json", "state.json")
# Names of the set that is tested on, the first that is there.
_TEST = ("test", "validation", "valid")


def read_any(
    directory: pathlib.Path, name: str, *, size: Size | None = None, column: str = ""
) -> Arrays:
    """Read a data set of images with one class each.

    Its first column of images counts, and its first column of classes (`ClassLabel`).
    Where it has no test set, a fixed fifth of each class is held out.

    Args:
      directory: where `name` lies, as `save_to_disk` wrote it. Tables of what is
        downloaded are kept there too, the files themselves in HF_HOME.
      name: of the data set: a folder in `directory`, or "OWNER/REPOSITORY" of the hub.
      size: height and width that images are resized to; None: squares of 16, 32 or 64
        pixels, whichever is nearest to the median of their longer sides.
      column: with the group of each training image; "": none.

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
    # The hub's test sets may have no labels, which -1 or nothing stands for.
    held_out = [_files(sets[part], name, part) for part in _TEST if part in sets]
    labelled = [found for found in held_out if _is_labelled(found[1])]
    parts = [_files(sets["train"], name, "train"), *labelled[:1]]
    if not _is_labelled(parts[0][1]):
        raise errors.DataError(
            f"data.name = 'hf:{name}': the split 'train' must have images, each with a"
            " class"
        )
    contents = [content for part, _ in parts for content in part]
    files = [(f"hf:{name}: image {i}", one) for i, one in enumerate(contents)]
    sides, grey = zip(*(images.look_at(*file) for file in files), strict=True)
    size = size or nearest_size(float(np.median(sides)))
    mode = "L" if all(grey) else "RGB"
    image = np.stack(list(images.decode_all(files, size, mode)))
    label = [classes for _, classes in parts]
    count, group = len(label[0]), _groups(sets["train"], column, name)
    if not labelled:
        return own.with_test_set(image, label[0], group)
    return Arrays(image[:count], label[0], image[count:], label[1], group)


def _load(directory: pathlib.Path, name: str) -> Any:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise errors.ConfigError(
            f"data.name = 'hf:{name}': needs the package datasets: pip install datasets"
        ) from error
    folder = directory / name
    # TFDS may have a folder of the same name there.
    saved = any((folder / mark).exists() for mark in _SAVED)
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(name, cache_dir=str(directory / "hub"))
    except Exception as error:  # the library, and what it is built of, raise many kinds
        where = (
            f"not in {directory.resolve()}, as save_to_disk writes it, nor available"
        )
        where = f"{folder}: cannot be read" if saved else f"{where} from the hub"
        raise errors.DataError(
            f"data.name = 'hf:{name}': {where}: {errors.reason(error)}"
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
    found = rows[column(datasets.ClassLabel, "classes")][:]
    label = np.array([-1 if one is None else one for one in found])
    kept = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    files = [row[image] or {} for row in kept]
    if missing := [i for i, file in enumerate(files) if not any(file.values())]:
        raise errors.DataError(
            f"data.name = 'hf:{name}': the split {part!r} must have an image in every"
            f" row: row {missing[0]} has none"
        )
    return [_content(file) for file in files], label.astype(np.int32)


def _groups(rows: Any, column: str, name: str) -> np.ndarray | None:
    """The column of groups [N], if one is asked for.

    Raises:
      DataError: there is none of that name.
    """
    if not column:
        return None
    if column not in rows.features:
        raise errors.DataError(
            f"data.column = {column!r}: must be a column of 'hf:{name}',"
            f" {', '.join(rows.features)}"
        )
    return np.asarray(rows[column][:])


def _is_labelled(label: np.ndarray) -> bool:
    return len(label) > 0 and label.min() >= 0


def _content(file: dict[str, Any]) -> bytes:
    """Of an image that lies in the table, or beside it."""
    return file["bytes"] or pathlib.Path(file["path"]).read_bytes()
