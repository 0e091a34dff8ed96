r"""Mosaic on your own images.

    python launch.py --config configs/own_mosaic.py --config.data.dir=FOLDER
    python launch.py --config configs/own_mosaic.py --config.data.name=npz \
        --config.data.dir=FILE.npz

FOLDER has a sub-folder of images for each class, or such in FOLDER/train and
FOLDER/test; FILE.npz has x_train, y_train and, if there is a test set, x_test, y_test.
Image size (16, 32 or 64 pixels), channels and classes follow the data.
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """Sizes for minutes on two CPU cores; scale rounds and widths up on a GPU."""
    base.known(variant, "default")
    config = base.for_two_cores()
    config.data.name = "folder"
    config.data.dir = "images"
    config.data.alpha = 0.1
    config.data.split_seed = 0
    config.generators.width = 16
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.distill.samples_per_generator = 16
    # Whatever the number of classes: no gate.
    config.meta.gate_experts = 1
    return config
