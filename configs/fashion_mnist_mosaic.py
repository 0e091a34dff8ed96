"""Mosaic on Fashion-MNIST, 32 x 32.

    python launch.py --config configs/fashion_mnist_mosaic.py
    python launch.py --config configs/fashion_mnist_mosaic.py:small

The default is a study for one GPU; `small` takes under 30 minutes on two CPU cores.
"""

from configs import base


def get_config(variant: str = "default"):
    """`default` or `small`."""
    config = base.get_config()
    config.data.name = "fashion_mnist"
    config.data.validation = 0.05
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.finetune.learning_rate = 1e-3
    if variant == "small":
        small(config)
    elif variant != "default":
        raise ValueError(f"{variant}: unknown variant; known: default, small")
    else:
        config.init.rounds = 100
        config.warmup.rounds = 10
        config.finetune.rounds = 10
        config.generators.epochs = 50
    return config


def small(config):
    """Shrink networks and rounds, in place."""
    config.data.max_images = 6000
    config.data.validation = 0.1
    base.for_two_cores(config)
    config.generators.width = 8
    config.distill.samples_per_generator = 8
    config.evaluation.every = 20
