"""The methods that Mosaic is compared with, on equal terms, on every data set.

python launch.py --config configs/baselines.py:digits:fedavg
python launch.py --config configs/baselines.py:digits:all
python launch.py --config configs/baselines.py:fashion_mnist:all:small
python launch.py --config configs/baselines.py:digits:fedproto:architectures
"""

import importlib
import pathlib

from ml_collections import config_dict

from mosaic_jax.configs import base
from mosaic_jax.run import methods


def get_config(variant: str = "digits:fedavg") -> config_dict.ConfigDict:
    """DATASET[:METHOD[:VARIANT]]: `METHOD` on the terms of `DATASET_mosaic.py:VARIANT`.

    Split, seed, model, local work and rounds are the same. METHOD is fedavg where none
    is given; a list's name, such as all or heterogeneous, makes a comparison.
    """
    dataset, method, mosaic = parts(variant, method="fedavg")
    return with_method(of_mosaic(dataset, mosaic), method)


def parts(variant: str, *, method: str) -> tuple[str, str, str]:
    """Data set, method and variant of DATASET[:METHOD[:VARIANT]].

    Args:
      variant: what stands after the file's name.
      method: where `variant` has none.
    """
    dataset, _, rest = variant.partition(":")
    given, _, mosaic = rest.partition(":")
    return dataset, given or method, mosaic or "default"


def of_mosaic(dataset: str, variant: str) -> config_dict.ConfigDict:
    """The configuration `variant` of `DATASET_mosaic.py`.

    Raises:
      ValueError: there is no such file, or no such variant in it.
    """
    folder, end = pathlib.Path(__file__).parent, "_mosaic"
    found = sorted(path.stem.removesuffix(end) for path in folder.glob(f"*{end}.py"))
    if dataset not in found:
        raise ValueError(f"{dataset}: unknown data set; known: {', '.join(found)}")
    module = importlib.import_module(f"{base.__package__}.{dataset}{end}")
    return module.get_config(variant)


def with_method(config: config_dict.ConfigDict, method: str) -> config_dict.ConfigDict:
    """Turn a Mosaic study into one of `method`, or a list's name into a comparison."""
    if method in methods.LISTS:
        config.compare = method
    else:
        methods.choose(config, method)
    return config
