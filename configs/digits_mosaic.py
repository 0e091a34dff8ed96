"""Mosaic on scikit-learn's real digits: the demo, for two CPU cores.

python launch.py --config configs/digits_mosaic.py

Two and a half minutes. Each field below that differs from the defaults was chosen on
the validation images; docs/ablation.md has what it is worth.
"""

from configs import base


def get_config():
    """Ten clients, mostly of one or two classes each."""
    config = base.get_config()
    config.data.name = "digits"
    config.data.validation = 0.125
    config.model.width = 8
    config.local.batch_size = 32
    config.local.learning_rate = 0.05
    config.init.rounds = 40
    config.warmup.rounds = 0
    config.generators.epochs = 0
    config.generators.steps = 500
    config.generators.batch_size = 32
    config.generators.width = 16
    config.generators.learning_rate = 1e-3
    config.generators.diversity_weight = 0.0
    config.generators.inversion_weight = 0.0
    config.distill.steps = 200
    config.distill.samples_per_generator = 16
    config.distill.learning_rate = 1e-3
    config.distill.schedule = "cosine"
    config.finetune.rounds = 6
    config.finetune.learning_rate = 0.01
    config.evaluation.every = 3
    return config
