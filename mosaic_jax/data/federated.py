"""A data set split over clients, with the held-out sets to measure on."""

import dataclasses
import logging
import pathlib

import numpy as np

from mosaic_jax import errors, files, settings, trees
from mosaic_jax.data import partition, sources
from mosaic_jax.data.arrays import Arrays, Info, absent
from mosaic_jax.types import Client, FederatedDataset, LabelledImages

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StudyData:
    """Everything that a study reads, in host memory.

    `held_out` has "test" and, where images were held out, "validation". `test_index`
    [C, M'] deals the test images evenly to the clients, for the accuracy
    of a client's own model; `parts` and `sha256` are the split over clients, in
    numbers of the images left for training; `content_sha256` is over all of it: what
    networks know of the images, those left for training, the held-out sets, the split.
    """

    info: Info
    clients: FederatedDataset
    held_out: dict[str, LabelledImages]
    test_index: np.ndarray
    parts: list[np.ndarray]
    label_count: np.ndarray
    sha256: str
    content_sha256: str


def load(config: settings.Data, seed: int) -> StudyData:
    """Load, hold out validation images, split.

    Raises:
      DataError: the data are missing or damaged, or the split cannot be met.
    """
    return build(config, seed, *sources.load(config.name, config.dir))


def build(config: settings.Data, seed: int, info: Info, arrays: Arrays) -> StudyData:
    """`load` from arrays at hand.

    Raises:
      DataError: they do not fit `info`, or the split cannot be met.
    """
    sources.check(config.name, info, arrays)
    if config.augmentation != "auto":
        info = dataclasses.replace(info, augmentation=config.augmentation)
    image, label = arrays.train_image, arrays.train_label
    split_seed = seed + config.split_seed
    if 0 < config.max_images < len(label):
        order = np.random.RandomState(split_seed).permutation(len(label))
        kept = np.sort(order[: config.max_images])
        image, label = image[kept], label[kept]
    num_validation = round(config.validation * len(label))
    sets = {"test": LabelledImages(arrays.test_image, arrays.test_label)}
    if num_validation:
        order = np.random.RandomState(split_seed).permutation(len(label))
        kept, rest = np.sort(order[num_validation:]), order[:num_validation]
        sets["validation"] = LabelledImages(image[rest], label[rest])
        image, label = image[kept], label[kept]
    if config.split == "file":
        parts = partition.read(
            config.split_file, num_images=len(label), num_clients=config.num_clients
        )
    else:
        parts = partition.split(
            label,
            mode=config.split,
            num_clients=config.num_clients,
            alpha=config.alpha,
            seed=split_seed,
        )
    if config.num_clients > len(arrays.test_label):
        raise errors.DataError(
            f"data.num_clients = {config.num_clients}: must be <="
            f" {len(arrays.test_label)}, the number of test images"
        )
    label_count = partition.label_counts(label, parts, info.num_classes)
    test_count = np.bincount(arrays.test_label, minlength=info.num_classes)
    if told := absent(label_count.sum(0), test_count):
        _log.warning("the clients hold %s", told)
    order = np.random.RandomState(split_seed).permutation(len(arrays.test_label))
    share = len(order) // config.num_clients
    train, sha256 = LabelledImages(image, label), partition.digest(parts)
    test_index = order[: share * config.num_clients].reshape(-1, share)
    # Whatever a stage can see of the data.
    content = {
        "info": dataclasses.asdict(info),
        "images": trees.digest({"train": train, "test_index": test_index, **sets}),
        "split": sha256,
    }
    return StudyData(
        info=info,
        clients=FederatedDataset(
            images=train,
            client=Client(
                number=np.arange(len(parts), dtype=np.int32),
                index=_padded(parts).astype(np.int32),
                size=np.array([len(part) for part in parts], np.int32),
                label_count=label_count.astype(np.int32),
            ),
        ),
        held_out=sets,
        test_index=test_index,
        parts=parts,
        label_count=label_count,
        sha256=sha256,
        content_sha256=settings.digest(content),
    )


def save_split(path: pathlib.Path, data: StudyData) -> None:
    """Write the split as JSON: hash, label counts and image numbers per client.

    The labels of the held-out sets are there too: a report needs no images.
    """
    content = {
        "sha256": data.sha256,
        "label_counts": data.label_count.tolist(),
        "clients": [part.tolist() for part in data.parts],
        "held_out_labels": {
            name: images.label.tolist() for name, images in data.held_out.items()
        },
    }
    files.write_json(path, content, indent=None)


def padded(data: StudyData, length: int) -> StudyData:
    """`data` with index rows of `length`: what is past a client's images is not read."""
    client = data.clients.client
    missing = length - client.index.shape[1]
    index = np.pad(client.index, [(0, 0), (0, missing)], mode="wrap")
    clients = data.clients.replace(client=client.replace(index=index))
    return dataclasses.replace(data, clients=clients)


def of_clients(data: StudyData, members: np.ndarray) -> StudyData:
    """`data` of the clients `members` [m] int alone; their numbers stay."""
    client = trees.take(data.clients.client, members)
    return dataclasses.replace(
        data,
        clients=data.clients.replace(client=client),
        test_index=data.test_index[members],
        parts=[data.parts[i] for i in members],
        label_count=data.label_count[members],
    )




def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of equal length: each client's image numbers, repeated past the longest.

    Lengths are multiples of half a client's fair share, so that the splits of several
    seeds mostly have the same shape and share their compiled programs.
    """
    longest = max(len(part) for part in parts)
    unit = max(1, sum(len(part) for part in parts) // len(parts) // 2)
    length = -(-longest // unit) * unit
    return np.stack([np.resize(part, length) for part in parts])
