"""The chain of stages that each method runs."""

from mosaic_jax.settings import Settings
from mosaic_jax.stages import (
    audit,
    distill,
    experts,
    federated,
    generators,
    meta,
    server,
)
from mosaic_jax.stages.base import Stage, for_clients_with


def pipeline(settings: Settings) -> list[Stage]:
    """Stages of `settings.method`, in order; those with 0 rounds are left out.

    Where clients have several networks, those with the same one are a federation of
    their own until the teacher is made.
    """
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
        clients = [gan, *rounds]
    else:
        clients = [rounds[0], gan, *rounds[1:]]
    clients.append(experts.experts_stage(settings))
    stages = _each_network(clients, settings.networks)
    stages += [
        experts.prototypes_stage(settings),
        meta.stage(settings),
        distill.stage(settings),
    ]
    stages += _each_network(finetune, settings.networks[:1])
    if settings.audit.images:
        stages += [audit.reference_stage(), audit.audit_stage(settings)]
    return stages


def _each_network(stages: list[Stage], networks: tuple[str, ...]) -> list[Stage]:
    """Each stage once for the clients of each network."""
    return [
        for_clients_with(stage, name, suffix=name != networks[0])
        for stage in stages
        for name in networks
    ]
