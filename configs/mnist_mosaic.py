"""Mosaic on MNIST, 32 x 32.

python launch.py --config configs/mnist_mosaic.py
"""

from ml_collections import config_dict

from mosaic_jax.configs import fashion_mnist_mosaic


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """The settings of Fashion-MNIST, `default` or `small`."""
    config = fashion_mnist_mosaic.get_config(variant)
    config.data.name = "mnist"
    return config
