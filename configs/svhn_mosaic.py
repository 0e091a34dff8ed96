"""Mosaic on SVHN (cropped digits).

python launch.py --config configs/svhn_mosaic.py
"""

from configs import cifar10_mosaic


def get_config():
    """The settings of CIFAR-10."""
    config = cifar10_mosaic.get_config()
    config.data.name = "svhn"
    return config
