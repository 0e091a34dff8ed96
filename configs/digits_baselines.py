"""The methods that Mosaic is compared with, on digits, on equal terms.

python launch.py --config configs/digits_baselines.py:fedavg
python launch.py --config configs/digits_baselines.py:all
"""

from configs import base, digits_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(digits_mosaic.get_config(), method)
