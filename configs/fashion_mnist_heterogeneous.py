"""Clients with networks of several sizes, on Fashion-MNIST.

python launch.py --config configs/fashion_mnist_heterogeneous.py
python launch.py --config configs/fashion_mnist_heterogeneous.py:heterogeneous
python launch.py --config configs/fashion_mnist_heterogeneous.py:heterogeneous:small
"""

from configs import base, fashion_mnist_mosaic


def get_config(variant: str = "mosaic+heterofl"):
    """`METHOD` or `METHOD:small`, as `small` of the Mosaic config is."""
    method, _, size = variant.partition(":")
    config = fashion_mnist_mosaic.get_config(size or "default")
    if size == "small":
        config.budgets.rates = (1.0, 0.5, 0.25)
    return base.baseline(config, method)
