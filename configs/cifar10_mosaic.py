"""Mosaic on CIFAR-10 at the size of the published study.

    python launch.py --config configs/cifar10_mosaic.py
    python launch.py --config configs/cifar10_mosaic.py:paper
    python launch.py --config configs/cifar10_mosaic.py:published
    python launch.py --config configs/cifar10_mosaic.py:published_0.1

About 5e16 floating-point operations: meant for a GPU or TPU. Needs the archive
cifar-10-binary.tar.gz, downloaded when missing. No accuracy has been measured yet.
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """`default`, or the study in another form.

    `paper` is the method as the paper tells it, as far as that is known; `published`
    what its code does, bugs left out. Both are for alpha 0.01; meta epochs and steps of
    distillation depend on alpha, so that 0.1 and 1.0 have variants of their own:
    `paper_0.1`, `paper_1.0`, `published_0.1`, `published_1.0`.
    """
    config = base.get_config()
    config.data.name = "cifar10"
    if base.known(variant, "default", *base.ORIGINAL) != "default":
        base.original(config, variant)
    return config
