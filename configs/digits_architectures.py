"""Clients with different architectures, on digits.

python launch.py --config configs/digits_architectures.py
"""

from ml_collections import config_dict

from configs import digits_mosaic


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """Every other client has a plain CNN, the rest the server's ResNet-18."""
    config = digits_mosaic.get_config(variant)
    config.model.others = ("cnn",)
    # Last rounds with half of the clients would forget the classes of the others.
    config.finetune.rounds = 0
    return config
