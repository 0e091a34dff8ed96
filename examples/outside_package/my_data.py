"""A data set that is drawn: noisy stripes; the class is their direction."""

import pathlib

import numpy as np

from mosaic_jax.data.dataset import Arrays

# A side has 16, 32 or 64 pixels.
SIZE, NUM_CLASSES = 16, 4


def stripes(directory: pathlib.Path) -> Arrays:
    """600 training and 200 test images [16, 16, 1] of four directions.

    `directory` is `config.data.dir`, where files would be read from.
    """
    del directory
    np_rng = np.random.RandomState(0)
    return Arrays(*_draw(np_rng, 600), *_draw(np_rng, 200))


def _draw(np_rng: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
    label = np.arange(count) % NUM_CLASSES
    angle = (np.pi * label / NUM_CLASSES)[:, None, None]
    phase = np_rng.uniform(0, 2 * np.pi, (count, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE]
    wave = np.sin(x[None] * np.cos(angle) + y[None] * np.sin(angle) + phase)
    noise = np_rng.normal(0, 1.5, wave.shape)
    image = (127.5 * (1 + wave + noise)).clip(0, 255).astype(np.uint8)
    return image[..., None], label
