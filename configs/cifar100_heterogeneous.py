"""Clients with networks of several sizes, on CIFAR-100.

python launch.py --config configs/cifar100_heterogeneous.py
python launch.py --config configs/cifar100_heterogeneous.py:heterogeneous
python launch.py --config configs/cifar100_heterogeneous.py:heterogeneous:resnet50
"""

from ml_collections import config_dict

from configs import base, cifar100_mosaic


def get_config(variant: str = "mosaic+heterofl") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: two of the ten clients at each rate from 1 to 1/16."""
    method, rest = base.parts(variant)
    return base.baseline(cifar100_mosaic.get_config(rest), method)
