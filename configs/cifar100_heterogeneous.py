"""Clients with networks of several sizes, on cifar100.

python launch.py --config configs/cifar100_heterogeneous.py
python launch.py --config configs/cifar100_heterogeneous.py:heterogeneous
"""

from configs import base, cifar100_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(cifar100_mosaic.get_config(), method)
