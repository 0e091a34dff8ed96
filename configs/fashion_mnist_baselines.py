"""The methods that Mosaic is compared with, on Fashion-MNIST, on equal terms.

python launch.py --config configs/fashion_mnist_baselines.py:fedavg
python launch.py --config configs/fashion_mnist_baselines.py:all
python launch.py --config configs/fashion_mnist_baselines.py:all:small
"""

from ml_collections import config_dict

from configs import base, fashion_mnist_mosaic


def get_config(variant: str = "fedavg") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: `METHOD` on the split, seed, model and rounds of Mosaic's."""
    method, rest = base.parts(variant)
    return base.baseline(fashion_mnist_mosaic.get_config(rest), method)
