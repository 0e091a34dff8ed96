"""Clients with networks of several sizes, on mnist.

python launch.py --config configs/mnist_heterogeneous.py
python launch.py --config configs/mnist_heterogeneous.py:heterogeneous
"""

from configs import base, mnist_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(mnist_mosaic.get_config(), method)
