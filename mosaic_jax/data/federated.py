"""A data set split over clients, with held-out sets to evaluate on."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import numpy as np

from mosaic_jax.core import errors, files, schema, trees
from mosaic_jax.core.types import Client, FederatedDataset, LabelledImages
from mosaic_jax.data import partition, shifts, sources
from mosaic_jax.data.canaries import Canaries
from mosaic_jax.data.dataset import (
    Arrays,
    Info,
    absent,
    pointless,
)
from mosaic_jax.data.settings import SPLIT_FIELDS, Data
from mosaic_jax.data.stored import selected

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StudyData:
    """All data of a study, in host memory; training images may lie in files.

    Attributes:
      info: what networks depend on.
      clients: training images, split over clients.
      held_out: "test" images and, if some were held out, "validation" images.
      test_index: [C, M'] int, test images of each client, for the accuracy of its own
        model: dealt evenly, or drawn by its classes.
      parts: numbers of each client's training images.
      label_count: [C, K] int, training images of each class at each client.
      sha256: hex digest of the split.
      content_sha256: hex digest of everything above: `info`, all images and labels, the
        split.
      attackers: numbers of the clients that attack the study, whose images may have
        false labels.
      canaries: planted among the clients' images, see `planted`; None: there are none.
    """

    info: Info
    clients: FederatedDataset
    held_out: dict[str, LabelledImages]
    test_index: np.ndarray
    parts: list[np.ndarray]
    label_count: np.ndarray
    sha256: str
    content_sha256: str
    attackers: tuple[int, ...] = ()
    canaries: Canaries | None = None


def load(config: Data, seed: int) -> StudyData:
    """Load a data set, hold out validation images and split the rest over clients.

    Raises:
      ConfigError: there is no data set of that name.
      DataError: the data are missing or damaged, or there is no such split.
    """
    found = sources.load(
        config.name,
        config.dir,
        size=config.size or None,
        column=config.column,
        in_memory=config.in_memory,
    )
    return build(config, seed, *found)


def build(config: Data, seed: int, info: Info, arrays: Arrays) -> StudyData:
    """Like `load`, for a data set that is at hand.

    Args:
      config: settings of data set and split.
      seed: of the study; splits depend on `config.split_seed` + `seed`.
      info: properties of the data set.
      arrays: its images and labels.

    Raises:
      DataError: the arrays contradict `info`, or there is no such split.
    """
    sources.check(config.name, info, arrays)
    if config.augmentation != "auto":
        info = dataclasses.replace(info, augmentation=config.augmentation)
    image, label, group = arrays.train_image, arrays.train_label, arrays.train_group
    split_seed = seed + config.split_seed
    if 0 < config.max_images < len(label):
        order = np.random.RandomState(split_seed).permutation(len(label))
        kept = np.sort(order[: config.max_images])
        image, label, group = selected(image, kept), label[kept], _of(group, kept)
    num_validation = round(config.validation * len(label))
    sets = {"test": LabelledImages(arrays.test_image, arrays.test_label)}
    if num_validation:
        order = np.random.RandomState(split_seed).permutation(len(label))
        kept, rest = np.sort(order[num_validation:]), order[:num_validation]
        sets["validation"] = LabelledImages(image[rest], label[rest])
        image, label, group = selected(image, kept), label[kept], _of(group, kept)
    if config.split == "file":
        parts = partition.read(
            config.split_file, num_images=len(label), num_clients=config.num_clients
        )
    else:
        parts = partition.split(
            label,
            mode=config.split,
            num_clients=config.num_clients,
            seed=split_seed,
            group=group,
            **{name: getattr(config, name) for name in SPLIT_FIELDS},
        )
    if config.num_clients > len(arrays.test_label):
        raise errors.DataError(
            f"data.num_clients = {config.num_clients}: must be <="
            f" {len(arrays.test_label)}, the number of test images"
        )
    label_count = partition.label_counts(label, parts, info.num_classes)
    test_count = np.bincount(arrays.test_label, minlength=info.num_classes)
    if message := pointless(label_count.sum(0), test_count):
        raise errors.DataError(f"data.name = {config.name}: {message}")
    for message in absent(label_count.sum(0), test_count):
        _log.warning("there is %s", message)
    if config.client_test == "own":
        test_index = partition.own_test_sets(label_count, arrays.test_label, split_seed)
    else:
        order = np.random.RandomState(split_seed).permutation(len(arrays.test_label))
        per_client = len(order) // config.num_clients
        test_index = order[: per_client * config.num_clients].reshape(-1, per_client)
    if config.shift != "none":
        image, sets = _shifted(config, split_seed, image, parts, sets, test_index)
    # Everything that a stage can read of the data.
    train, sha256 = LabelledImages(image, label), partition.digest(parts)
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
        content_sha256=schema.digest(content),
    )


def _of(group: np.ndarray | None, kept: np.ndarray) -> np.ndarray | None:
    """The groups of the images that are kept."""
    return None if group is None else np.asarray(group)[kept]


def _shifted(
    config: Data,
    seed: int,
    image: np.ndarray,
    parts: list[np.ndarray],
    sets: dict[str, LabelledImages],
    test_index: np.ndarray,
) -> tuple[np.ndarray, dict[str, LabelledImages]]:
    """Training images and held-out sets, each image shifted as its client's.

    Test images are those of the client that they are dealt to; what is left over, and
    validation images, are dealt in turn.
    """
    count = len(parts)
    owner = {name: np.arange(len(one.label)) % count for name, one in sets.items()}
    owner["test"][test_index] = np.arange(count)[:, None]
    mine = np.full(len(image), -1)
    for i, part in enumerate(parts):
        mine[part] = i
    image, *held_out = np.split(
        shifts.of_clients(
            np.concatenate([image, *(np.asarray(one.image) for one in sets.values())]),
            np.concatenate([mine, *owner.values()]),
            num_clients=count,
            name=config.shift,
            strength=config.shift_strength,
            seed=seed,
        ),
        np.cumsum([len(mine), *map(len, owner.values())])[:-1],
    )
    return image, {
        name: LabelledImages(found, one.label)
        for (name, one), found in zip(sets.items(), held_out, strict=True)
    }


def save_split(path: pathlib.Path, data: StudyData) -> None:
    """Write the split as JSON: digest, label counts and image numbers per client.

    The labels of the held-out sets and the properties of the images are included, so
    that neither a report nor a trained model needs the images.
    """
    content = {
        "sha256": data.sha256,
        "info": dataclasses.asdict(data.info),
        "label_counts": data.label_count.tolist(),
        "clients": [part.tolist() for part in data.parts],
        "held_out_labels": {
            name: np.asarray(images.label).tolist()
            for name, images in data.held_out.items()
        },
    }
    files.write_json(path, content, indent=None)


def padded(data: StudyData, length: int) -> StudyData:
    """`data` with index rows padded to `length`; the padding is never read."""
    client = data.clients.client
    missing = length - client.index.shape[1]
    index = np.pad(np.asarray(client.index), [(0, 0), (0, missing)], mode="wrap")
    clients = data.clients.replace(client=client.replace(index=index))
    return dataclasses.replace(data, clients=clients)


def attacked(
    data: StudyData,
    attackers: np.ndarray,
    change: Callable[[np.ndarray, int], np.ndarray],
) -> StudyData:
    """`data` in which attackers' images have the labels that they want them to have.

    Args:
      data: of a study; returned as it is if it has attackers already.
      attackers: [m] int, numbers of these clients.
      change: from true labels [n] and the number of classes to others [n].
    """
    if data.attackers:
        return data
    images, classes = data.clients.images, data.info.num_classes
    label = np.array(images.label)
    rows = np.concatenate([data.parts[i] for i in attackers])
    label[rows] = change(label[rows], classes)
    count = partition.label_counts(label, data.parts, classes)
    client = data.clients.client.replace(label_count=count.astype(np.int32))
    content = data.content_sha256
    if not np.array_equal(label, images.label):
        content = schema.digest({"data": content, "labels": trees.digest(label)})
    return dataclasses.replace(
        data,
        clients=FederatedDataset(images.replace(label=label), client),
        label_count=count,
        content_sha256=content,
        attackers=tuple(attackers.tolist()),
    )


def planted(data: StudyData, canaries: Canaries) -> StudyData:
    """`data` whose clients train on their canaries that are `inside`, too.

    The images of all canaries come behind the others, those of client 0 first; so their
    number is the same for every seed.

    Args:
      data: of a study; returned as it is if it has canaries already.
      canaries: of its clients.
    """
    if data.canaries is not None:
        return data
    images, count = data.clients.images, canaries.label.size
    image = canaries.image.reshape(count, *canaries.image.shape[2:])
    number = len(images.label) + np.arange(count).reshape(canaries.label.shape)
    parts = [
        np.concatenate([part, number[i][canaries.inside[i]]])
        for i, part in enumerate(data.parts)
    ]
    label = np.concatenate([images.label, canaries.label.reshape(-1)])
    train = LabelledImages(np.concatenate([images.image, image]), label)
    label_count = partition.label_counts(label, parts, data.info.num_classes)
    planted = trees.digest({"image": image, "label": canaries.label})
    sha256 = partition.digest(parts)
    content = {"data": data.content_sha256, "canaries": planted, "split": sha256}
    return dataclasses.replace(
        data,
        clients=FederatedDataset(
            images=train,
            client=data.clients.client.replace(
                index=_padded(parts).astype(np.int32),
                size=np.array([len(part) for part in parts], np.int32),
                label_count=label_count.astype(np.int32),
            ),
        ),
        parts=parts,
        label_count=label_count,
        sha256=sha256,
        content_sha256=schema.digest(content),
        canaries=canaries,
    )


def of_clients(data: StudyData, members: np.ndarray) -> StudyData:
    """`data` of the clients `members` [m] int only, which keep their numbers."""
    client = trees.take(data.clients.client, members)
    return dataclasses.replace(
        data,
        clients=data.clients.replace(client=client),
        test_index=data.test_index[members],
        parts=[data.parts[i] for i in members],
        label_count=data.label_count[members],
    )


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """Each client's image numbers, repeated to rows of equal length.

    The length is a multiple of half the mean number of images per client, so that the
    splits of several seeds mostly have the same shape and share compiled programs.
    """
    longest = max(len(part) for part in parts)
    unit = max(1, sum(len(part) for part in parts) // len(parts) // 2)
    length = -(-longest // unit) * unit
    return np.stack([np.resize(part, length) for part in parts])
