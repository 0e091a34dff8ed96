"""The methods that Mosaic is compared with, on tiny_imagenet, on equal terms.

python launch.py --config configs/tiny_imagenet_baselines.py:fedavg
python launch.py --config configs/tiny_imagenet_baselines.py:all
"""

from configs import base, tiny_imagenet_mosaic


def get_config(method: str = "fedavg"):
    """`method` on Mosaic's split, seed, model and total number of rounds."""
    return base.baseline(tiny_imagenet_mosaic.get_config(), method)
