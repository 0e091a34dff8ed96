"""Mosaic on scikit-learn's real digits: the demo, for two CPU cores.

python launch.py --config configs/digits_mosaic.py

Two and a half minutes. Each field below that differs from the defaults was chosen on
the validation images; docs/ablation.md has what it is worth.
"""

from ml_collections import config_dict

from configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """Ten clients, mostly of one or two classes each."""
    base.known(variant, "default")
    config = base.for_two_cores()
    config.data.name = "digits"
    config.data.validation = 0.125
    config.generators.width = 16
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.distill.samples_per_generator = 16
    config.evaluation.every = 3
    return config
