"""Mosaic on CIFAR-100.

python launch.py --config configs/cifar100_mosaic.py
python launch.py --config configs/cifar100_mosaic.py:resnet50
python launch.py --config configs/cifar100_mosaic.py:paper
python launch.py --config configs/cifar100_mosaic.py:published
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """The published study where its settings are known, else those of CIFAR-10.

    `default` has the ResNet-18 of the published code, `resnet50` a ResNet-50. `paper`,
    `published` and those for other alphas, such as `published_0.1`, are as for
    CIFAR-10, for which alone lengths of meta head, distillation and last rounds are
    told.
    """
    config = base.get_config()
    config.data.name = "cifar100"
    if base.known(variant, "default", "resnet50", *base.ORIGINAL) == "resnet50":
        config.model.name = "resnet50"
    config.local.steps = 20
    config.init.rounds = 1000
    config.prototypes.clusters = 60
    config.meta.gate_experts = 100
    config.distill.learning_rate = 1e-5
    if variant in base.ORIGINAL:
        base.original(config, variant)
    return config
