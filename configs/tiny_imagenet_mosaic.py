"""Mosaic on Tiny-ImageNet, 32 x 32.

python launch.py --config configs/tiny_imagenet_mosaic.py
python launch.py --config configs/tiny_imagenet_mosaic.py:resnet50
"""

from ml_collections import config_dict

from mosaic_jax.configs import cifar100_mosaic


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """The settings of CIFAR-100, in each of its variants, with 200 classes."""
    config = cifar100_mosaic.get_config(variant)
    config.data.name = "tiny_imagenet"
    config.meta.gate_experts = 200
    return config
