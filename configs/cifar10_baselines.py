"""The methods that Mosaic is compared with, on cifar10, on equal terms.

python launch.py --config configs/cifar10_baselines.py:fedavg
python launch.py --config configs/cifar10_baselines.py:all
"""

from configs import base, cifar10_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(cifar10_mosaic.get_config(), method)
