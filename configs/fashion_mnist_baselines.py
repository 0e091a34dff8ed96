"""The methods that Mosaic is compared with, on fashion_mnist, on equal terms.

python launch.py --config configs/fashion_mnist_baselines.py:fedavg
python launch.py --config configs/fashion_mnist_baselines.py:all
"""

from configs import base, fashion_mnist_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(fashion_mnist_mosaic.get_config(), method)
