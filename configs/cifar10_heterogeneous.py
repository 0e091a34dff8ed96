"""Clients with networks of several sizes, on CIFAR-10.

python launch.py --config configs/cifar10_heterogeneous.py
python launch.py --config configs/cifar10_heterogeneous.py:heterogeneous
"""

from configs import base, cifar10_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(cifar10_mosaic.get_config(), method)
