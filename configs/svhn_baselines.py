"""The methods that Mosaic is compared with, on svhn, on equal terms.

python launch.py --config configs/svhn_baselines.py:fedavg
python launch.py --config configs/svhn_baselines.py:all
"""

from configs import base, svhn_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(svhn_mosaic.get_config(), method)
