"""Mosaic on SVHN (cropped digits).

python launch.py --config configs/svhn_mosaic.py
python launch.py --config configs/svhn_mosaic.py:published
"""

from ml_collections import config_dict

from mosaic_jax.configs import cifar10_mosaic


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """The settings of CIFAR-10, in each of its variants."""
    config = cifar10_mosaic.get_config(variant)
    config.data.name = "svhn"
    return config
