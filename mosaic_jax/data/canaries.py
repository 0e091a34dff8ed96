"""Canaries: images that are planted among clients' own, each by a coin of its own.

Whoever guesses the coins from what a client sends bounds from below what it tells of
one image (`fl/membership.py`). They must be images and labels that a model can only
know by heart: here tiles of random shades, with random labels. No accuracy is judged by
them.
"""

import dataclasses

import numpy as np

# Tiles on each side of a canary.
_TILES = 4


@dataclasses.dataclass(frozen=True)
class Canaries:
    """M canaries of each of C clients.

    Attributes:
      image: uint8 [C, M, H, W, D].
      label: [C, M] int32, whatever classes the client holds.
      inside: [C, M] bool, those that the client trains on.
    """

    image: np.ndarray
    label: np.ndarray
    inside: np.ndarray


def draw(
    count: int,
    num_clients: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
) -> Canaries:
    """Canaries of all clients.

    Args:
      count: M, of each client.
      num_clients: C.
      image_shape: (H, W, D).
      num_classes: K, from which labels are drawn evenly.
      seed: of the study.
    """
    np_rng = np.random.default_rng([seed, *b"canaries"])
    height, width, depth = image_shape
    tiles = np_rng.integers(0, 256, (num_clients, count, _TILES, _TILES, depth))
    row, column = (np.arange(n) * _TILES // n for n in (height, width))
    image = tiles[:, :, row][:, :, :, column]
    label = np_rng.integers(0, num_classes, (num_clients, count))
    inside = np_rng.random((num_clients, count)) < 0.5
    return Canaries(image.astype(np.uint8), label.astype(np.int32), inside)
