"""Mosaic on CIFAR-100.

python launch.py --config configs/cifar100_mosaic.py
"""

from configs import base


def get_config():
    """The published study where its settings are known, else those of CIFAR-10."""
    config = base.get_config()
    config.data.name = "cifar100"
    config.model.name = "resnet50"
    config.local.steps = 20
    config.init.rounds = 1000
    config.prototypes.clusters = 60
    config.meta.gate_experts = 100
    config.distill.learning_rate = 1e-5
    return config
