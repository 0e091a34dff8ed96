"""Stage 7: the global model learns from the teacher on generated images."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from mosaic_jax.core import flops, prng, trees
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Generators, ModelState, Teacher, Tree
from mosaic_jax.fl import gan
from mosaic_jax.server.base import Task
from mosaic_jax.server.distillation import (
    Distillation,
    DistillSettings,
    EnsembleAndGenerators,
)
from mosaic_jax.stages import server
from mosaic_jax.stages.base import (
    Blueprint,
    Context,
    Outcome,
    Stage,
    assess,
    each_network,
)
from mosaic_jax.stages.meta import teacher_flops

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Distill(DistillSettings, Stage):
    """Stage 7: distil the teacher into the global model on generated images."""

    name = "distill"

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The student, the teacher, and the generators that draw the images."""
        generators = each_network("client_generators", study)
        return ("global_model", "teacher", *generators)

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The distilled global model."""
        del study
        return ("student",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the teacher's head and of the generators' networks."""
        del study
        return ("meta", "generators", "compat")

    def run(
        self,
        context: Context,
        global_model: ModelState,
        teacher: Teacher,
        **generators: Generators,
    ) -> Run:
        """Train the student and evaluate it."""
        return _distill(self, context, global_model, teacher, generators)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """A model with the shapes of the global one."""
        return {"student": blueprint.model}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of drawing images, and of the teacher and the student on them."""
        info, clients = blueprint.data.info, blueprint.data.clients.num_clients
        model_gan = gan.build(blueprint.settings, info, blueprint.classifier)
        generator, _ = model_gan.flops(info.image_shape)
        forward = blueprint.classifier.flops(info.image_shape)
        each = teacher_flops(blueprint) + generator + flops.TRAINED * forward
        images = self.steps * self.samples_per_generator * clients
        return images * each + blueprint.num_held_out * forward


def _distill(
    config: Distill,
    context: Context,
    global_model: ModelState,
    teacher: Teacher,
    generators: dict[str, Generators],
) -> Run:
    settings, info = context.settings, context.data.info
    # The clients of one network after those of the other.
    client_generators = trees.concatenate(list(generators.values()))
    sizes = [context.for_network(name).clients.client.size for name in context.networks]
    server.check_alive(client_generators, settings.generators.collapse_below)
    weight = client_generators.alive.astype(jnp.float32)
    if config.weighting == "size":
        weight *= jnp.concatenate(sizes)
    method = Distillation(
        config=config,
        ensemble=settings.meta.ensemble(context),
        model_gan=gan.build(settings, info, context.classifier),
        num_clients=context.data.clients.num_clients,
    )
    task = Task(
        classifier=context.classifier,
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        augmentation=info.augmentation,
        lowering=settings.compute.convolution,
        batch_norm=config.batch_norm,
        num_clients=method.num_clients,
    )
    student = yield from server.train(
        context,
        "student",
        method,
        task,
        global_model,
        EnsembleAndGenerators(
            teacher, client_generators.model, weight, context.held_out
        ),
        config.steps,
        key=prng.named(context.key, "step"),
        samples=method.samples,
        mean=True,
    )
    assessed = assess(context, context.classifier.logits, student)
    return Outcome(
        artifacts={"student": student},
        models={"distilled": assessed, "final": assessed},
    )
