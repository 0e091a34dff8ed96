"""Stage 7: the global model learns from the teacher on generated images."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from mosaic_jax.core import flops, prng, programs, trees
from mosaic_jax.core.steps import Run, Steps, repeat
from mosaic_jax.core.types import Array, Generators, ModelState, Teacher, Tree
from mosaic_jax.fl import gan
from mosaic_jax.server.base import Task
from mosaic_jax.server.distillation import (
    Distillation,
    DistillSettings,
    EnsembleAndGenerators,
    Pool,
)
from mosaic_jax.stages import coverage, health, server
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
    tells_nothing = True

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The student, the teacher, and the generators that draw the images."""
        return ("global_model", "teacher", *_generators(study))

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The distilled global model."""
        del study
        return ("student",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the teacher's head and of the generators' networks."""
        del study
        return ("meta", "generators", "compat")

    @property
    def pool_steps(self) -> int:
        """Steps in which the pool is drawn."""
        return -(-self.pool // self.samples_per_generator)

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
        images = self.steps * self.samples_per_generator * clients
        drawn = self.pool_steps * self.samples_per_generator * clients or images
        passes = flops.TRAINED + bool(self.focus)
        return (
            drawn * (teacher_flops(blueprint) + generator)
            + images * passes * forward
            + blueprint.num_held_out * forward
        )


def _distill(
    config: Distill,
    context: Context,
    global_model: ModelState,
    teacher: Teacher,
    generators: dict[str, Generators],
) -> Run:
    settings, info = context.settings, context.data.info
    client_generators = trees.concatenate(list(generators.values()))
    client = context.by_network
    health.check_alive(client_generators, settings.generators.collapse_below)
    weight = client_generators.alive.astype(jnp.float32)
    if config.weighting == "size":
        weight *= client.size
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
    teachers = EnsembleAndGenerators(
        teacher=teacher,
        generators=client_generators.model,
        weight=weight,
        label_count=client.label_count,
        pool=(),
        held_out=context.held_out,
    )
    seen = coverage.of_generators(
        context, method.ensemble, method.model_gan, teacher, client_generators, client
    )
    if config.pool:
        pool = yield from _draw_pool(config, context, method, teachers)
        teachers = dataclasses.replace(teachers, pool=pool)
    student = yield from server.train(
        context,
        "student",
        method,
        task,
        global_model,
        teachers,
        config.steps,
        key=prng.named(context.key, "step"),
        samples=method.samples,
        mean=True,
    )
    assessed = assess(context, context.classifier.logits, student)
    return Outcome(
        artifacts={"student": student},
        models={"distilled": assessed, "final": assessed},
        **seen.outcome(coverage.real_images(context)),
    )


def _draw_pool(
    config: Distill,
    context: Context,
    method: Distillation,
    teachers: EnsembleAndGenerators,
) -> Run:
    """The pool, as a loop of its own."""

    def chunk(
        args: Tree, pool: Pool, first: Array, end: Array
    ) -> tuple[Pool, dict[str, Array]]:
        teachers, key = args

        def body(number: Array, pool: Pool) -> tuple[Pool, dict[str, Array]]:
            return method.fill(pool, teachers, prng.at(key, number), number), {}

        return repeat(body, pool, first, end)

    info, shape = context.data.info, (method.num_clients, config.pool)
    blank = Pool(
        image=jnp.zeros((*shape, *info.image_shape), jnp.uint8),
        logits=jnp.zeros((*shape, info.num_classes)),
    )
    pool = yield Steps(
        "pool",
        chunk,
        (teachers, prng.named(context.key, "pool")),
        blank,
        config.pool_steps,
        every=context.settings.log.every_steps,
        samples_per_step=method.samples,
    )
    return programs.jit(method.filled)(pool, teachers)


def _generators(study: "Settings") -> tuple[str, ...]:
    """Names of the artifacts with the generators that draw the images."""
    names = each_network("client_generators", study)
    return ("refined_generators",) if study.refine.steps else names
