"""The stages of a study and their order, its chain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mosaic_jax.core import errors, registry, schema
from mosaic_jax.stages.base import Link, Stage
from mosaic_jax.stages.reference import Reference

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

# A user's own only; those of this library belong to the method of the study.
STAGES: registry.Registry[type[Stage]] = registry.Registry(
    "stages", {}, registry.subclass_of(Stage)
)


def chain(study: "Settings") -> tuple[Link, ...]:
    """The stages of `study.method` and the user's own, in order.

    Stages of 0 rounds are left out. Where clients have several networks, those with
    the same network form a federation of their own until the teacher is trained.

    Raises:
      ConfigError: a user's own stage cannot be imported, or the stage that it follows
        is not part of the study.
    """
    links = _mosaic(study) if study.method == "mosaic" else _federated(study)
    for path in study.stages:
        links = _inserted(links, _user_stage(path, study))
    return tuple(links)


def _federated(study: "Settings") -> list[Link]:
    if study.exchanges_prototypes:
        return [Link(stage) for stage in study.prototype_rounds]
    rounds: list[Stage] = [study.init]
    if study.trains_once and study.server.asks_for_generators():
        rounds = _with_generators(study)
    if study.warmup.rounds:
        rounds.append(study.warmup)
    if study.trains_once:
        rounds.append(study.server)
    if study.finetune.rounds:
        rounds.append(study.finetune)
    return _for_each_network(rounds, study.networks[:1]) + _attacks(study)


def _mosaic(study: "Settings") -> list[Link]:
    names = study.networks
    federated = _with_generators(study)
    if study.warmup.rounds:
        federated.append(study.warmup)
    federated.append(study.experts)
    links = _for_each_network(federated, names)
    links += [Link(study.prototypes), Link(study.meta)]
    if study.refine.steps:
        links.append(Link(study.refine))
    links.append(Link(study.distill))
    if study.finetune.rounds:
        links += _for_each_network([study.finetune], names[:1])
    if study.audit.images:
        links += [Link(Reference()), Link(study.audit)]
    return links + _attacks(study)


def _attacks(study: "Settings") -> list[Link]:
    return [Link(study.leakage)] if study.leakage.images else []


def _with_generators(study: "Settings") -> list[Stage]:
    """The first rounds and the clients' GANs, in the order of the study."""
    found: list[Stage] = [study.init, study.generators]
    return found[::-1] if study.compat.generators_first else found


def _for_each_network(stages: Sequence[Stage], networks: Sequence[str]) -> list[Link]:
    """Each stage once for the clients of each network; the first is the server's."""
    return [
        Link(stage, name, "" if i == 0 else f"@{name}")
        for stage in stages
        for i, name in enumerate(networks)
    ]


def _user_stage(path: str, study: "Settings") -> Stage:
    """The stage at an import path, with its fields from `study.methods`."""
    stage = registry.build(STAGES, path, study.methods)
    name = getattr(stage, "name", "")
    if not name or hasattr(study, name):
        raise errors.ConfigError(
            f"stages = {path!r}: name = {name!r}: must be one of its own, not a group"
            " of the settings"
        )
    return stage


def _inserted(links: Sequence[Link], stage: Stage) -> list[Link]:
    """The chain with `stage` behind each link of the stage that it names in `after`."""
    if not any(link.stage.name == stage.after for link in links):
        known = list(dict.fromkeys(link.stage.name for link in links))
        raise errors.ConfigError(
            f"stage {stage.name!r}: after = {stage.after!r}: must be a stage of the"
            f" study, {schema.near(stage.after, known)}"
        )
    if any(link.stage.name == stage.name for link in links):
        raise errors.ConfigError(
            f"stage {stage.name!r}: another stage of the study has this name: `name` of"
            f" your own must be another than {', '.join(link.name for link in links)}"
        )
    result: list[Link] = []
    for link in reversed(links):
        if link.stage.name == stage.after:
            # Behind those of the user that already follow the same stage.
            place = 0
            while place < len(result) and result[place].stage.after == stage.after:
                place += 1
            result.insert(place, Link(stage, link.network, link.suffix))
        result.insert(0, link)
    return result
