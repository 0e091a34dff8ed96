"""Mosaic on scikit-learn's real digits: the demo, for two CPU cores.

python launch.py --config configs/digits_mosaic.py
python launch.py --config configs/digits_mosaic.py:architectures

Two and a half minutes. Each field below that differs from the defaults was chosen on
the validation images; docs/ablation.md has what it is worth.
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """Ten clients, mostly of one or two classes each.

    Of `architectures` every other client has a plain CNN, the rest the server's
    ResNet-18.
    """
    base.known(variant, "default", "architectures")
    config = base.for_two_cores()
    config.data.name = "digits"
    config.data.validation = 0.125
    config.generators.width = 16
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.distill.samples_per_generator = 16
    config.evaluation.every = 3
    if variant == "architectures":
        config.model.others = ("cnn",)
        # Last rounds with half of the clients would forget the classes of the others.
        config.finetune.rounds = 0
    return config
