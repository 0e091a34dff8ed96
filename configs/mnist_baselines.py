"""The methods that Mosaic is compared with, on mnist, on equal terms.

python launch.py --config configs/mnist_baselines.py:fedavg
python launch.py --config configs/mnist_baselines.py:all
"""

from configs import base, mnist_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(mnist_mosaic.get_config(), method)
