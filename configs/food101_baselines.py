"""The methods that Mosaic is compared with, on food101, on equal terms.

python launch.py --config configs/food101_baselines.py:fedavg
python launch.py --config configs/food101_baselines.py:all
"""

from configs import base, food101_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(food101_mosaic.get_config(), method)
