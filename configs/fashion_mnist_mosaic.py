"""Mosaic on Fashion-MNIST, 32 x 32.

    python launch.py --config configs/fashion_mnist_mosaic.py
    python launch.py --config configs/fashion_mnist_mosaic.py:small

The default is a study for one GPU; `small` takes under 30 minutes on two CPU cores.
"""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config(variant: str = "default") -> config_dict.ConfigDict:
    """`default` or `small`; both fine-tune at 1e-3."""
    small = base.known(variant, "default", "small") == "small"
    config = base.for_two_cores() if small else base.get_config()
    config.data.name = "fashion_mnist"
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.finetune.learning_rate = 1e-3
    if small:
        config.data.max_images = 6000
        config.data.validation = 0.1
        config.generators.width = 8
        config.generators.steps = 3000
        config.generators.ema_decay = 0.995
        config.distill.pool = 1024
        config.distill.samples_per_generator = 16
        config.distill.steps = 300
        config.evaluation.every = 20
    else:
        config.data.validation = 0.05
        config.init.rounds = 100
        config.warmup.rounds = 10
        config.finetune.rounds = 10
        config.generators.epochs = 50
    return config
