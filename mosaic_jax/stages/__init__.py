"""The chain of stages that each method runs."""

from mosaic_jax.settings import Settings
from mosaic_jax.stages import distill, experts, federated, generators, meta, server
from mosaic_jax.stages.base import Stage


def pipeline(settings: Settings) -> list[Stage]:
    """Stages of `settings.method`, in order; those with 0 rounds are left out."""
    rounds = [federated.init_stage(settings)]
    if settings.warmup.rounds:
        rounds.append(federated.warmup_stage(settings))
    finetune = []
    if settings.finetune.rounds:
        finetune.append(federated.finetune_stage(settings))
    if settings.method == "federated" and settings.trains_once:
        return [*rounds, server.stage(settings), *finetune]
    if settings.method == "federated":
        return rounds
    gan = generators.stage(settings)
    if settings.generators.when == "before_init":
        stages = [gan, *rounds]
    else:
        stages = [rounds[0], gan, *rounds[1:]]
    stages += [
        experts.experts_stage(settings),
        experts.prototypes_stage(settings),
        meta.stage(settings),
        distill.stage(settings),
    ]
    return stages + finetune
