"""The methods that Mosaic is compared with, on MNIST, on equal terms.

python launch.py --config configs/mnist_baselines.py:fedavg
python launch.py --config configs/mnist_baselines.py:all
"""

from ml_collections import config_dict

from configs import base, mnist_mosaic


def get_config(variant: str = "fedavg") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: `METHOD` on the split, seed, model and rounds of Mosaic's."""
    method, rest = base.parts(variant)
    return base.baseline(mnist_mosaic.get_config(rest), method)
