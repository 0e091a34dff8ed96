"""The methods that Mosaic is compared with, on fashion_mnist, on equal terms.

python launch.py --config configs/fashion_mnist_baselines.py:fedavg
python launch.py --config configs/fashion_mnist_baselines.py:all
python launch.py --config configs/fashion_mnist_baselines.py:all:small
"""

from configs import base, fashion_mnist_mosaic


def get_config(variant: str = "fedavg"):
    """`METHOD` or `METHOD:small`, as `small` of the Mosaic config is."""
    method, _, size = variant.partition(":")
    return base.baseline(fashion_mnist_mosaic.get_config(size or "default"), method)
