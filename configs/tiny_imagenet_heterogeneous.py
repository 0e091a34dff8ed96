"""Clients with networks of several sizes, on tiny_imagenet.

python launch.py --config configs/tiny_imagenet_heterogeneous.py
python launch.py --config configs/tiny_imagenet_heterogeneous.py:heterogeneous
"""

from configs import base, tiny_imagenet_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(tiny_imagenet_mosaic.get_config(), method)
