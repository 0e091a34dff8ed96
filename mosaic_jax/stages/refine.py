"""Stage 6b: the server moves the clients' generators towards what the teacher knows."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import numpy as np

from mosaic_jax.core import flops, prng, trees
from mosaic_jax.core.steps import Metrics, Repeated, Run, Steps
from mosaic_jax.core.types import Array, Generators, Teacher, Tree
from mosaic_jax.fl import gan
from mosaic_jax.server import refinement
from mosaic_jax.stages import coverage, generators, health
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, each_network
from mosaic_jax.stages.meta import teacher_flops

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Refine(refinement.RefineSettings, Stage):
    """Stage 6b: steps on uploaded generators until the teacher recognises them."""

    name = "refine"
    tells_nothing = True

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The teacher, and the generators that clients sent."""
        return ("teacher", *each_network("client_generators", study))

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The generators that draw the images of the distillation."""
        del study
        return ("refined_generators",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the teacher's head and of the generators' networks."""
        del study
        return ("meta", "generators", "compat")

    def reads_images(self, study: "Settings") -> bool:
        """Generated ones alone."""
        del study
        return False

    def run(self, context: Context, teacher: Teacher, **uploaded: Generators) -> Run:
        """Refine one generator after the other."""
        return _refine(self, context, teacher, uploaded)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Generators [C, ...] of the clients of all networks."""
        return {"refined_generators": generators.shapes(blueprint)}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of the teacher and the generators in all steps."""
        info, clients = blueprint.data.info, blueprint.data.clients.num_clients
        model_gan = gan.build(blueprint.settings, info, blueprint.classifier)
        generator, _ = model_gan.flops(info.image_shape)
        # Images are drawn by the uploaded generator too.
        generator *= 1 + flops.TRAINED
        each = generator + flops.THROUGH * teacher_flops(blueprint)
        return clients * self.steps * self.batch_size * each


def _refine(
    config: Refine,
    context: Context,
    teacher: Teacher,
    artifacts: dict[str, Generators],
) -> Run:
    settings = context.settings
    uploaded = trees.concatenate(list(artifacts.values()))
    client = context.by_network
    health.check_alive(uploaded, settings.generators.collapse_below)
    ensemble = settings.meta.ensemble(context)
    model_gan = gan.build(settings, context.data.info, context.classifier)
    seen = coverage.of_generators(
        context, ensemble, model_gan, teacher, uploaded, client
    )
    share = seen.share.astype(np.float32)

    def one(args: Tree, state: Tree, row: Array) -> tuple[Tree, Metrics]:
        teacher, uploaded, share, number, key = args
        refined, loss = refinement.refine(
            config,
            ensemble,
            model_gan,
            teacher,
            trees.take(uploaded, row),
            share[row],
            prng.at(key, number[row]),
        )
        state = jax.tree.map(lambda all_, new: all_.at[row].set(new), state, refined)
        return state, {"loss": loss}

    refined = yield Steps(
        "generator",
        Repeated(one),
        (teacher, uploaded.model, share, client.number, context.key),
        uploaded.model,
        len(share),
        every=1,
        samples_per_step=config.steps * config.batch_size,
    )
    return Outcome(
        artifacts={"refined_generators": uploaded.replace(model=refined)},
        results=seen.results,
    )
