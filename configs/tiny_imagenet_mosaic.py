"""Mosaic on Tiny-ImageNet, 32 x 32.

python launch.py --config configs/tiny_imagenet_mosaic.py
"""

from configs import cifar100_mosaic


def get_config():
    """The settings of CIFAR-100, with 200 classes."""
    config = cifar100_mosaic.get_config()
    config.data.name = "tiny_imagenet"
    config.meta.gate_experts = 200
    return config
