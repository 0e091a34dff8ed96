"""Mosaic on Food-101, 32 x 32.

python launch.py --config configs/food101_mosaic.py
"""

from configs import cifar100_mosaic


def get_config():
    """The settings of CIFAR-100, with 101 classes."""
    config = cifar100_mosaic.get_config()
    config.data.name = "food101"
    config.meta.gate_experts = 101
    return config
