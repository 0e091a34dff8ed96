"""Mosaic on CIFAR-10 at the size of the published study.

    python launch.py --config configs/cifar10_mosaic.py
    python launch.py --config configs/cifar10_mosaic.py:published

About 4e16 floating-point operations: meant for a GPU or TPU. Needs the archive
cifar-10-binary.tar.gz, downloaded when missing. No accuracy has been measured yet.
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """`default`, or `published`: what the published code does, bugs left out."""
    config = base.get_config()
    config.data.name = "cifar10"
    if base.known(variant, "default", "published") == "published":
        published(config)
    return config


def published(config: config_dict.ConfigDict) -> None:
    """Set every field to the published code's behaviour, in place."""
    config.compat.generators_first = True
    config.compat.fresh_classifier = True
    config.compat.classifier_batch_norm = "train"
    config.compat.diversity_target = "uniform"
    config.compat.value_range = "normalised"
    config.compat.ema_debiased = False
    config.generators.min_steps = 0
    config.generators.inversion_weight = 0.0
    config.generators.collapse_below = 0.0
    config.prototypes.space = "global"
    config.meta.head = "transformer"
    config.meta.steps = 150
    config.distill.divergence = "logit_mean"
