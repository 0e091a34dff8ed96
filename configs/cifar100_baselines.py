"""The methods that Mosaic is compared with, on cifar100, on equal terms.

python launch.py --config configs/cifar100_baselines.py:fedavg
python launch.py --config configs/cifar100_baselines.py:all
"""

from configs import base, cifar100_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(cifar100_mosaic.get_config(), method)
