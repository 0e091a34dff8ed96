"""Clients with networks of several sizes, on digits.

python launch.py --config configs/digits_heterogeneous.py
python launch.py --config configs/digits_heterogeneous.py:fedrolex
python launch.py --config configs/digits_heterogeneous.py:heterogeneous
"""

from configs import base, digits_mosaic


def get_config(method: str = "mosaic+heterofl"):
    """`method` where a third of the clients holds all, half, a quarter of the width."""
    config = digits_mosaic.get_config()
    config.budgets.rates = (1.0, 0.5, 0.25)
    return base.baseline(config, method)
