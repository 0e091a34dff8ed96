"""Settings of a data set and of its split over clients."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mosaic_jax.core import schema
from mosaic_jax.data import augment, partition, shifts, sources
from mosaic_jax.data.dataset import LEAST_SIDE, MOST_SIDE, is_size


@dataclasses.dataclass(frozen=True)
class Data(schema.Group):
    """Data set and its split over clients."""

    name: str = schema.component(
        sources.SOURCES, default="cifar10", meaning="the data set"
    )
    dir: str = schema.anything(
        default="data",
        meaning="archives are looked for, downloaded and cached here; of folder and"
        " npz: your images",
    )
    size: tuple = schema.field(
        (),
        f"() or a height and a width of {LEAST_SIDE}..{MOST_SIDE} pixels",
        lambda value: not value or is_size(value),
        "of images; (): as they are, or squares of 16, 32 or 64 where they may be any",
    )
    in_memory: bool = schema.anything(
        default=True,
        meaning="False, of tfds:NAME: training images are read from the files when"
        " clients need them",
    )
    column: str = schema.anything(
        default="",
        meaning="of npz, tfds:NAME and hf:NAME: whose each training image is, for"
        " split by_column",
    )
    augmentation: str = schema.one_of(
        ("auto", *augment.AUGMENTATIONS),
        default="auto",
        meaning="of training images; auto: as is usual for the data set",
    )
    split: str = schema.component(
        (*partition.MODES, "file"),
        default="dirichlet_unbalanced",
        meaning="how images are dealt to clients",
    )
    split_file: str = schema.anything(
        default="",
        meaning="of split file: JSON as a run's split.json, or CSV: client, index",
    )
    num_clients: int = schema.at_least(1, default=10, meaning="number of clients")
    alpha: float = schema.above(
        0, default=0.01, meaning="Dirichlet concentration; smaller: clients differ more"
    )
    iid_share: float = schema.between(
        0,
        1,
        default=0.5,
        meaning="of split dirichlet_mixed: share of the images that is dealt evenly",
    )
    classes_per_client: int = schema.at_least(
        1,
        default=2,
        meaning="of split pathological; of split shards: shards for each client",
    )
    sigma: float = schema.at_least(
        0,
        default=1.0,
        meaning="of split quantity: deviation of the logarithm of clients' sizes",
    )
    shift: str = schema.component(
        ("none", *shifts.SHIFTS),
        default="none",
        meaning="what makes each client's images look different",
    )
    shift_strength: float = schema.between(
        0,
        1,
        default=1.0,
        meaning="of the last clients; 1: a whole turn, noise as strong as white,"
        " channels of no light",
    )
    client_test: str = schema.one_of(
        ("even", "own"),
        default="even",
        meaning="test images for a client's own model; even: a part for each; own: by"
        " the classes of its training images",
    )
    split_seed: int = schema.at_least(
        0,
        default=5363,
        meaning="added to the study's seed; with seed 0: the published CIFAR-10 split",
    )
    max_images: int = schema.at_least(
        0, default=0, meaning="> 0: train on a random subset of this size"
    )
    validation: float = schema.below_one(
        default=0.0, meaning="share of the training images that no client gets"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """A split file where one is read, and only there; shifts need dealt images.

        Images that are read from files are those of TFDS, as they are there.
        """
        del study
        if not self.in_memory and not self.name.startswith("tfds:"):
            yield (
                f"data.in_memory = False: must be True for data.name = {self.name!r}:"
                " of sets tfds:NAME alone images are read from the files"
            )
        if not self.in_memory and self.shift != "none":
            yield (
                f"data.shift = {self.shift!r}: must be 'none' for data.in_memory ="
                " False: images stay as they are in the files"
            )
        if (self.split == "file") != bool(self.split_file):
            yield (
                f"data.split_file = {self.split_file!r}: must be a path for"
                " data.split = 'file', and '' otherwise"
            )
        if self.shift != "none" and self.client_test != "even":
            yield (
                f"data.client_test = {self.client_test!r}: must be 'even' for"
                f" data.shift = {self.shift!r}, where a test image is one client's"
            )


# Settings that a way to split may name.
SPLIT_FIELDS = ("alpha", "iid_share", "classes_per_client", "sigma")
