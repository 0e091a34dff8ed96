"""Partitioners of the library flwr-datasets, as ways to split."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from mosaic_jax.core import errors


def is_partitioner(found: Any) -> bool:
    """Whether `found` is such an object, by what it has."""
    return callable(getattr(found, "load_partition", None)) and hasattr(
        found, "num_partitions"
    )


def of_partitioner(partitioner: Any) -> Callable[..., list[np.ndarray]]:
    """The split that a partitioner draws, as a function that `partition.split` takes.

    It sees a table with the columns "label", "index" (the number of each image) and, if
    it is known whose the images are, "group". It draws by its own seed, not by the
    study's.

    Args:
      partitioner: of flwr-datasets; it is copied, never changed.
    """

    def deal(
        labels: np.ndarray,
        num_clients: int,
        np_rng: np.random.RandomState,
        *,
        group: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        import datasets  # flwr-datasets needs it too

        del np_rng
        columns = {"label": labels, "index": np.arange(len(labels))}
        if group is not None:
            columns["group"] = group
        own = copy.deepcopy(partitioner)
        own.dataset = datasets.Dataset.from_dict(columns)
        if own.num_partitions != num_clients:
            raise errors.DataError(
                f"data.num_clients = {num_clients}: must be {own.num_partitions}, the"
                f" partitions of the {type(own).__name__}"
            )
        return [np.asarray(own.load_partition(i)["index"]) for i in range(num_clients)]

    return deal
