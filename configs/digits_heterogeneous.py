"""Clients with networks of several sizes, on digits.

python launch.py --config configs/digits_heterogeneous.py
python launch.py --config configs/digits_heterogeneous.py:fedrolex
python launch.py --config configs/digits_heterogeneous.py:heterogeneous
"""

from ml_collections import config_dict

from configs import base, digits_mosaic


def get_config(variant: str = "mosaic+heterofl") -> config_dict.ConfigDict:
    """METHOD: a third of the clients holds all, half, a quarter of the width."""
    method, rest = base.parts(variant)
    config = digits_mosaic.get_config(rest)
    config.budgets.rates = (1.0, 0.5, 0.25)
    return base.baseline(config, method)
