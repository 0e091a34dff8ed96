"""Known answers of the published PyTorch networks, and the weights they belong to.

`reference_outputs.npz` holds outputs computed once in float32 on a CPU;
`state_dict_shapes.json` the published parameter names and shapes.
"""

import json
import pathlib

import numpy as np

_FOLDER = pathlib.Path(__file__).parent
OUTPUTS = np.load(_FOLDER / "reference_outputs.npz", allow_pickle=False)
PARTITION = json.loads((_FOLDER / "partition.json").read_text())
SHAPES = json.loads((_FOLDER / "state_dict_shapes.json").read_text())


def state_dict(network: str, seed: int) -> dict[str, np.ndarray]:
    """The weights that the reference outputs were computed with."""
    np_rng = np.random.RandomState(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape, np.int64)
        if name.endswith("running_var"):
            value = np_rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            value = 0.1 * np_rng.standard_normal(shape)
        elif len(shape) >= 2:
            value = np_rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            value = 1 + 0.1 * np_rng.standard_normal(shape)
        else:
            value = 0.1 * np_rng.standard_normal(shape)
        return np.asarray(value, np.float32)

    return {name: draw(name, tuple(shape)) for name, shape in SHAPES[network].items()}


def images(seed: int, batch: int = 4) -> np.ndarray:
    """[batch, 32, 32, 3] standard normal."""
    shape = (batch, 3, 32, 32)
    draw = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    return draw.transpose(0, 2, 3, 1)


def noise(seed: int, batch: int = 4) -> np.ndarray:
    """[batch, 100] standard normal."""
    draw = np.random.RandomState(seed).standard_normal((batch, 100, 1, 1))
    return draw.astype(np.float32).reshape(batch, 100)
