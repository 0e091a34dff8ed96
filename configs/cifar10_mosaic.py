"""Mosaic on CIFAR-10 at the size of the published study.

    python launch.py --config configs/cifar10_mosaic.py
    python launch.py --config configs/cifar10_mosaic.py:published

About 6e16 floating-point operations: meant for a GPU or TPU. Needs the archive
cifar-10-binary.tar.gz, downloaded when missing. No accuracy has been measured yet.
"""

from ml_collections import config_dict

from configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """`default`, or `published`: what the published code does, bugs left out."""
    config = base.get_config()
    config.data.name = "cifar10"
    if base.known(variant, "default", "published") == "published":
        published(config)
    return config


def published(config: config_dict.ConfigDict) -> None:
    """Set every field to the published code's behaviour, in place."""
    config.generators.when = "before_init"
    config.generators.classifier = "fresh"
    config.generators.classifier_batch_norm = "train"
    config.generators.min_steps = 0
    config.generators.diversity_target = "uniform"
    config.generators.inversion_weight = 0.0
    config.generators.value_range = "normalised"
    config.generators.collapse_below = 0.0
    config.prototypes.space = "global"
    config.meta.head = "transformer"
    config.meta.steps = 150
    config.meta.ema_debiased = False
    config.distill.divergence = "logit_mean"
