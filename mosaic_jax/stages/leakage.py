"""Leakage: attacks on what clients send, by a server that would know their images.

It is no part of the method: whoever attacks here holds all images, also those that they
are asked of, and nothing that they find goes back into training. docs/privacy.md says
what each attacker sees.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mosaic_jax.core import flops, schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Tree
from mosaic_jax.fl import workload
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.stages import candidates, federation, gradients, leakage_section
from mosaic_jax.stages.attacker import Attacker
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, each_network
from mosaic_jax.stages.candidates import Scores
from mosaic_jax.stages.gradients import Inverted

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Leakage(Stage):
    """Attacks what clients sent, after the study; it changes no result.

    Canaries are planted before it, and change all of them.
    """

    name = "leakage"
    tells_nothing = True  # to the server: it is no part of the study

    images: int = schema.at_least(
        0,
        default=0,
        meaning="most images of a client that attackers are asked of, beside as many"
        " others; 0: no attacks",
    )
    shadows: int = schema.field(
        8,
        "0, or even and >= 4",
        # Of one model of each kind there is no deviation.
        lambda value: value >= 0 and value % 2 == 0 and value != 2,
        "models trained on random halves of these, for each client; 0: no LiRA",
    )
    shadow_generators: bool = schema.anything(
        default=False,
        meaning="shadows train GANs too, for LiRA on generators: as much work as the"
        " clients' times leakage.shadows",
    )
    generated: int = schema.at_least(
        1, default=256, meaning="images drawn from each generator, to be compared with"
    )
    canaries: int = schema.at_least(
        0,
        default=0,
        meaning="images planted for each client, each trained on or not by a coin, that"
        " bound epsilon from below; they cost accuracy",
    )
    inversion_steps: int = schema.at_least(
        0, default=0, meaning="of finding images by their gradient; 0: not done"
    )
    inversion_images: int = schema.between(
        1, 8, default=1, meaning="that a gradient is of"
    )
    inversion_rate: float = schema.above(
        0, default=0.1, meaning="Adam's first learning rate on pixels in [-1, 1]"
    )
    inversion_smooth: float = schema.at_least(
        0, default=1e-3, meaning="weight of the images' total variation"
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Attacks are on models that clients send whole, and where there are any."""
        if not self.images:
            if self.canaries:
                yield (
                    f"leakage.canaries = {self.canaries}: must be 0 for leakage.images"
                    " = 0, where nobody looks for them"
                )
            return
        algorithm = ALGORITHMS.find(study.init.method)
        if study.exchanges_prototypes or not algorithm.has_global_model:
            yield (
                f"leakage.images = {self.images}: must be 0 for init.method ="
                f" {study.init.method!r}, whose clients send no whole models"
            )
        elif self.shadows and not study.sends_whole_uploads:
            yield (
                f"leakage.shadows = {self.shadows}: must be 0 for init.method ="
                f" {study.init.method!r}, whose clients do no local SGD on the whole"
                " network"
            )
        if self.shadow_generators and not (self.shadows and _has_generators(study)):
            yield (
                f"leakage.shadow_generators = {self.shadow_generators}: must be False"
                f" for method = {study.method!r} and leakage.shadows = {self.shadows}:"
                " there is no generator to attack, or no shadow"
            )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """What clients sent, and what the server had made of it by then."""
        kinds = ["global_model", "client_models"]
        if _has_generators(study):
            kinds.append("client_generators")
        shared: tuple[str, ...] = ()
        if _has_prototypes(study):
            kinds.append("experts")
            shared = ("prototypes",)
        return (*shared, *(n for kind in kinds for n in each_network(kind, study)))

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """How clients train, what their generators are, and whether they differ."""
        rounds = ("local", "init.rounds", "warmup.rounds")
        sent = ("generators", "compat") if _has_generators(study) else ()
        if _has_prototypes(study):
            sent += ("prototypes.space",)
        if self.shadow_generators:
            sent += federation.reads_holdings(study)
        return (*rounds, *sent, "data.shift", "privacy.delta")

    def run(self, context: Context, **artifacts: Tree) -> Run:
        """Attack every client's models, generator and prototypes, then one gradient."""
        images = candidates.every_image(context)
        numbers = np.asarray(context.data.clients.client.number).tolist()
        asked = {
            number: candidates.of_client(context, images, number, self.images)
            for number in numbers
        }
        found: list[Scores] = []
        inverted: list[Inverted] = []
        for i, name in enumerate(context.networks):
            suffix = f"@{name}" if i else ""
            own = context.for_network(name)
            model, sent = (
                artifacts[kind + suffix] for kind in ("global_model", "client_models")
            )
            members = np.asarray(own.data.clients.client.number).tolist()
            took_part = np.asarray(sent.last_round) >= 0
            places = [
                (place, asked[number])
                for place, number in enumerate(members)
                if took_part[place] and len(asked[number].row) > 1
            ]
            if not places:
                continue
            length = max(len(one.row) for one in asked.values())
            attack = Attacker(self, own, images, places, length, suffix)
            shades, drawing = [], []
            if self.shadows:
                shadow = attack.shadows()
                models = yield from shadow.models(attack.start(model))
                shades = shadow.each(models)
                if self.shadow_generators:
                    drawn = yield from shadow.generators(models, model)
                    drawing = shadow.each(drawn)
            found += attack.on_models(sent, shades)
            if generators := artifacts.get(f"client_generators{suffix}"):
                found += attack.on_generators(generators, drawing)
            if prototypes := artifacts.get("prototypes"):
                names = each_network("experts", context.settings)
                models = (artifacts[name].model for name in names)
                experts = dict(zip(context.networks, models, strict=True))
                found += attack.on_prototypes(prototypes, experts, sent, model)
            if self.inversion_steps:
                inverted += yield from attack.on_gradients(model)
        return _outcome(context, found, inverted)

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of the shadows, of what models are asked, and of the inversion."""
        data, local = blueprint.data, blueprint.settings.local
        size = np.asarray(data.clients.client.size)
        steps = self.shadows * workload.mean_steps(local, size) * len(size)
        inverted = self.inversion_steps * min(len(size), gradients.MOST_CLIENTS)
        # Of a gradient in the images: twice that of a gradient.
        images = steps * local.batch_size + 2 * inverted * self.inversion_images
        asked = 2 * np.minimum(size, self.images) + self.canaries
        forward = blueprint.classifier.flops(data.info.image_shape)
        passes = flops.TRAINED * images + (1 + self.shadows) * asked.sum()
        gans = 0.0
        if self.shadow_generators:
            gans = self.shadows * blueprint.settings.generators.flops(blueprint)
        return float(passes * forward + gans)


def _has_generators(study: "Settings | schema.View") -> bool:
    return study.method == "mosaic" or (
        study.trains_once and study.server.asks_for_generators()
    )


def _has_prototypes(study: "Settings | schema.View") -> bool:
    return study.method == "mosaic" and study.prototypes.gathered == "once"


def _outcome(
    context: Context, found: list[Scores], inverted: list[Inverted]
) -> Outcome:
    """What the attacks tell, in the record, the summary, the report and the log."""
    plan = context.privacy
    rows = candidates.judged(
        found,
        # Of whole clients it holds for models of rounds, not for what is attacked here.
        () if plan is None or plan.of_clients else plan.epsilon,
        context.settings.privacy.delta,
    )
    for line in leakage_section.broken(rows):
        _log.warning("leakage: %s", line)
    results: dict[str, Any] = {"leakage": rows}
    if inverted:
        results["inverted"] = [
            {"client": one.client, "psnr": one.psnr, "by_chance": one.by_chance}
            for one in inverted
        ]
    return Outcome(
        artifacts={},
        results=results,
        headline=leakage_section.headline(rows),
        section=leakage_section.section(rows, inverted),
        pictures=leakage_section.pictures(inverted),
    )
