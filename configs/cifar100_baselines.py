"""The methods that Mosaic is compared with, on CIFAR-100, on equal terms.

python launch.py --config configs/cifar100_baselines.py:fedavg
python launch.py --config configs/cifar100_baselines.py:all
python launch.py --config configs/cifar100_baselines.py:all:resnet50
"""

from ml_collections import config_dict

from configs import base, cifar100_mosaic


def get_config(variant: str = "fedavg") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: `METHOD` on the split, seed, model and rounds of Mosaic's."""
    method, rest = base.parts(variant)
    return base.baseline(cifar100_mosaic.get_config(rest), method)
