"""The methods that Mosaic is compared with, on SVHN, on equal terms.

python launch.py --config configs/svhn_baselines.py:fedavg
python launch.py --config configs/svhn_baselines.py:all
"""

from ml_collections import config_dict

from configs import base, svhn_mosaic


def get_config(variant: str = "fedavg") -> config_dict.ConfigDict:
    """METHOD[:VARIANT]: `METHOD` on the split, seed, model and rounds of Mosaic's."""
    method, rest = base.parts(variant)
    return base.baseline(svhn_mosaic.get_config(rest), method)
