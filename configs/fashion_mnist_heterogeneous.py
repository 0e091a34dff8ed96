"""Clients with networks of several sizes, on Fashion-MNIST.

python launch.py --config configs/fashion_mnist_heterogeneous.py
python launch.py --config configs/fashion_mnist_heterogeneous.py:heterogeneous
python launch.py --config configs/fashion_mnist_heterogeneous.py:heterogeneous:small
"""

from ml_collections import config_dict

from configs import base, fashion_mnist_mosaic


def get_config(variant: str = "mosaic+heterofl") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: two of the ten clients at each rate from 1 to 1/16.

    Of `small` a third of the clients holds all, half, a quarter of the width.
    """
    method, rest = base.parts(variant)
    config = fashion_mnist_mosaic.get_config(rest)
    if rest == "small":
        config.budgets.rates = (1.0, 0.5, 0.25)
    return base.baseline(config, method)
