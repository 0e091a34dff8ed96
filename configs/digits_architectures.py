"""Clients with different architectures, on digits.

python launch.py --config configs/digits_architectures.py
"""

from configs import digits_mosaic


def get_config():
    """Every other client has a plain CNN, the rest the server's ResNet-18."""
    config = digits_mosaic.get_config()
    config.model.others = ("cnn",)
    # Last rounds with half of the clients would forget the classes of the others.
    config.finetune.rounds = 0
    return config
