"""Random images dealt to clients: what benchmarks of speed train on."""

import numpy as np

from mosaic_jax.core.types import Client, FederatedDataset, LabelledImages

SIDE, DEPTH, CLASSES = 32, 3, 10


def dataset(num_clients: int, size: int) -> FederatedDataset:
    """`size` images for each client, in host memory; the same on every call."""
    np_rng = np.random.RandomState(0)
    total = num_clients * size
    return FederatedDataset(
        LabelledImages(
            np_rng.randint(0, 256, (total, SIDE, SIDE, DEPTH)).astype(np.uint8),
            np_rng.randint(0, CLASSES, total).astype(np.int32),
        ),
        Client(
            number=np.arange(num_clients, dtype=np.int32),
            index=np.arange(total, dtype=np.int32).reshape(num_clients, size),
            size=np.full(num_clients, size, np.int32),
            label_count=np.full((num_clients, CLASSES), size // CLASSES, np.int32),
        ),
    )
