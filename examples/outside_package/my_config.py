"""A study of this folder's own parts: mosaic run --config my_config.py."""

from ml_collections import config_dict

from mosaic_jax.configs import base


def get_config() -> config_dict.ConfigDict:
    """Mosaic among four clients, for a minute on two CPU cores."""
    config = base.for_two_cores()
    config.data.name = "my_data:stripes"
    config.data.num_clients = 4
    config.data.alpha = 0.1
    config.data.split_seed = 0
    config.model.name = "my_network:PatchNet"
    config.init.method = "my_algorithm:ServerMomentum"
    config.stages = ("my_stage:Confidence",)
    config.distill.divergence = "my_loss:total_variation"

    config.methods.ServerMomentum = config_dict.ConfigDict({"momentum": 0.3})
    config.methods.Confidence = config_dict.ConfigDict({"images": 200})

    config.local.learning_rate = 0.1
    config.init.rounds = 20
    config.generators.steps = 300
    config.generators.ema_decay = 0.9
    config.generators.width = 8
    config.generators.inversion_weight = 0.0  # the network has no batch-norm to match
    config.meta.steps = 500
    config.meta.gate_experts = 1
    config.distill.steps = 50
    config.distill.samples_per_generator = 16
    config.finetune.rounds = 8
    config.audit.images = 0
    return config
