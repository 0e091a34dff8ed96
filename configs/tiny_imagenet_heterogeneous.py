"""Clients with networks of several sizes, on Tiny-ImageNet.

python launch.py --config configs/tiny_imagenet_heterogeneous.py
python launch.py --config configs/tiny_imagenet_heterogeneous.py:heterogeneous
python launch.py --config configs/tiny_imagenet_heterogeneous.py:heterogeneous:resnet50
"""

from ml_collections import config_dict

from configs import base, tiny_imagenet_mosaic


def get_config(variant: str = "mosaic+heterofl") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: two of the ten clients at each rate from 1 to 1/16."""
    method, rest = base.parts(variant)
    return base.baseline(tiny_imagenet_mosaic.get_config(rest), method)
