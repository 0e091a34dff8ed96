"""Clients with networks of several sizes, on svhn.

python launch.py --config configs/svhn_heterogeneous.py
python launch.py --config configs/svhn_heterogeneous.py:heterogeneous
"""

from configs import base, svhn_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` with two of the ten clients at each rate from 1 to 1/16."""
    return base.baseline(svhn_mosaic.get_config(), method)
