"""Clients with networks of several sizes, on food101.

python launch.py --config configs/food101_heterogeneous.py
python launch.py --config configs/food101_heterogeneous.py:heterogeneous
"""

from configs import base, food101_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(food101_mosaic.get_config(), method)
