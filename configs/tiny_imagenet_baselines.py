"""The methods that Mosaic is compared with, on Tiny-ImageNet, on equal terms.

python launch.py --config configs/tiny_imagenet_baselines.py:fedavg
python launch.py --config configs/tiny_imagenet_baselines.py:all
python launch.py --config configs/tiny_imagenet_baselines.py:all:resnet50
"""

from ml_collections import config_dict

from configs import base, tiny_imagenet_mosaic


def get_config(variant: str = "fedavg") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: `METHOD` on the split, seed, model and rounds of Mosaic's."""
    method, rest = base.parts(variant)
    return base.baseline(tiny_imagenet_mosaic.get_config(rest), method)
