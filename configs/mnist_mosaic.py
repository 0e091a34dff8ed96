"""Mosaic on MNIST, 32 x 32.

python launch.py --config configs/mnist_mosaic.py
"""

from configs import fashion_mnist_mosaic


def get_config():
    """The settings of Fashion-MNIST."""
    config = fashion_mnist_mosaic.get_config()
    config.data.name = "mnist"
    return config
