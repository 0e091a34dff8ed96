"""DFRD (Luo et al., 2023): data-free robust distillation with two generators."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema, sharing, trees
from mosaic_jax.core.types import (
    Array,
    DFRDState,
    GeneratorState,
    ModelState,
    Teachers,
    Tree,
)
from mosaic_jax.fl import training
from mosaic_jax.nn import conditional, dcgan, losses
from mosaic_jax.server import base


@dataclasses.dataclass(frozen=True)
class DFRD(base.ServerTraining):
    """Conditional generator with fidelity, transferability and diversity losses.

    The teacher is `D(x, y) = sum_i tau_iy f_i(x)`, with tau from the labels that the
    clients used in this round. The generator minimises `CE(D, y) - transfer_weight
    E_eps KL(D || f) + diversity_weight L_div`, where E_eps is the mean over samples on
    which the teacher is right and the global model f is wrong, 0 without any. The
    student minimises `KL(D/T || f/T)` on the generator's samples, plus `average_share`
    times the same on those of the generator's running mean over rounds, from the second
    round on.

    Reference: the original code starts the running mean at zero and creates new
    optimisers in every iteration; here the mean starts as a copy of the generator, and
    Adam keeps its moments.
    """

    iterations: int = schema.at_least(0, default=10, meaning="in a round")
    generator_steps: int = schema.at_least(1, default=2, meaning="in an iteration")
    student_steps: int = schema.at_least(1, default=5, meaning="in an iteration")
    batch_size: int = schema.at_least(1, default=64, meaning="samples, B")
    latent_dim: int = schema.at_least(1, default=100, meaning="of the noise")
    width: int = schema.at_least(1, default=128, meaning="of the generator")
    generator_learning_rate: float = schema.above(
        0, default=2e-4, meaning="Adam(0.5, 0.999)"
    )
    student_learning_rate: float = schema.above(0, default=0.01, meaning="SGD")
    weight_decay: float = schema.at_least(0, default=1e-4, meaning="L2 of the student")
    transfer_weight: float = schema.at_least(0, default=1.0, meaning="beta_tran")
    diversity_weight: float = schema.at_least(0, default=1.0, meaning="beta_div")
    average_decay: float = schema.between(
        0, 1, default=0.5, meaning="lambda of the running mean"
    )
    average_share: float = schema.at_least(0, default=0.5, meaning="alpha")
    temperature: float = schema.above(
        0, default=10.0, meaning="T, without the factor T^2"
    )

    def init(self, task: base.Task, model: ModelState, key: jax.Array) -> DFRDState:
        """An initial generator, and a copy of it as the running mean."""
        del model
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        generator = base.generator_state(self._module(task), self._tx, key, z, label)
        return DFRDState(generator, generator.model)

    def train(
        self,
        task: base.Task,
        state: DFRDState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[DFRDState, ModelState, dict[str, Array]]:
        """Iterations of generator and student steps, then an update of the mean."""
        tau, share = base.class_shares(teachers.label_count)
        # There is no earlier generator in the first round.
        average_share = jnp.where(number > 0, self.average_share, 0.0)

        def draw(at: Array) -> tuple[Array, Array]:
            label = base.draw_labels(prng.named(at, "label"), share, self.batch_size)
            shape = (self.batch_size, self.latent_dim)
            z = jax.random.normal(prng.named(at, "z"), shape)
            return sharing.spread((z, label))

        def teach(image: Array, label: Array) -> Array:
            logits = base.client_logits(task, teachers.client_model, image)
            return jnp.einsum("mb,mbk->bk", tau[:, label], logits)

        def iteration(i: Array, carry: Tree) -> Tree:
            generator, model, total = carry

            def generator_step(j: Array, carry: tuple[GeneratorState, Array]):
                generator, total = carry
                z, label = draw(prng.at(prng.named(key, "generator"), i, j))
                generator, loss = base.generator_step(
                    self._tx,
                    generator,
                    lambda params: self._objective(
                        task, generator.model, params, model, teach, z, label
                    ),
                )
                return generator, total + loss

            generator, g_loss = jax.lax.fori_loop(
                0, self.generator_steps, generator_step, (generator, jnp.zeros(()))
            )

            def student_step(j: Array, carry: tuple[ModelState, Array]):
                at = prng.at(prng.named(key, "student"), i, j)
                sources = (generator.model, "new"), (state.average, "average")
                image, target = [], []
                for source, name in sources:
                    z, label = draw(prng.named(at, name))
                    image.append(self.sample(task, source, z, label))
                    target.append(teach(image[-1], label))
                model, loss = self._student_step(
                    task, carry[0], image, target, average_share
                )
                return model, carry[1] + loss

            model, s_loss = jax.lax.fori_loop(
                0, self.student_steps, student_step, (model, jnp.zeros(()))
            )
            steps = jnp.array([self.generator_steps, self.student_steps])
            return generator, model, total + jnp.stack([g_loss, s_loss]) / steps

        generator, model, total = jax.lax.fori_loop(
            0, self.iterations, iteration, (state.generator, model, jnp.zeros(2))
        )
        average = _blend(state.average, generator.model, 1 - self.average_decay)
        total = total / max(self.iterations, 1)
        metrics = {"generator_loss": total[0], "student_loss": total[1]}
        return DFRDState(generator, average), model, metrics

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes."""
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        generator = base.generator_flops(self._module(task), z, label)
        classifier = task.classifier.flops(task.image_shape)
        made = self.generator_steps * (
            flops.TRAINED * generator + flops.THROUGH * (num_teachers + 1) * classifier
        )
        # Of the new generator's images and of its running mean's.
        learned = generator + (num_teachers + flops.TRAINED) * classifier
        each = self.batch_size * (made + 2 * self.student_steps * learned)
        return rounds * self.iterations * each

    def generator_loss(
        self, student: Array, teacher: Array, label: Array, diversity: Array
    ) -> Array:
        """The generator's loss.

        Args:
          student: logits [B, K] of the global model.
          teacher: logits [B, K].
          label: [B] int32, that the samples were generated for.
          diversity: L_div, [].
        """
        gained = (jnp.argmax(teacher, -1) == label) & (jnp.argmax(student, -1) != label)
        transferred = -losses.masked_mean(losses.kl(teacher, student), gained)
        return (
            losses.cross_entropy(teacher, label)
            + self.transfer_weight * transferred
            + self.diversity_weight * diversity
        )

    def student_loss(self, student: Array, teacher: Array) -> Array:
        """`KL(D/T || f/T)` of logits [B, K], without the factor T^2."""
        scaled = teacher / self.temperature, student / self.temperature
        return jnp.mean(losses.kl(*scaled))

    def sample(
        self, task: base.Task, generator: ModelState, z: Array, label: Array
    ) -> Array:
        """Generate images, by running statistics.

        Args:
          task: properties of the study.
          generator: its variables.
          z: noise [B, latent_dim].
          label: [B] int32, the class that each image should show.

        Returns:
          Signed images [B, H, W, D].
        """
        return self._module(task).apply(generator.variables, z, label, train=False)[0]

    @property
    def _tx(self) -> optax.GradientTransformation:
        return optax.adam(self.generator_learning_rate, b1=0.5, b2=0.999)

    def _module(self, task: base.Task) -> conditional.DFRDGenerator:
        size, channels = dcgan.side_of(task.image_shape), task.image_shape[-1]
        return conditional.DFRDGenerator(
            size, channels, task.num_classes, self.latent_dim, self.width, task.lowering
        )

    def _objective(self, task, generator, params, model, teach, z, label):
        """Loss of the generator's `params`, and its new statistics."""
        (image, merged), updated = self._module(task).apply(
            generator.replace(params=params).variables,
            z,
            label,
            train=True,
            mutable=["batch_stats"],
        )
        loss = self.generator_loss(
            task.classifier.logits(model, image),
            teach(image, label),
            label,
            losses.pairwise_diversity(image, merged, power=2),
        )
        return loss, updated["batch_stats"]

    def _student_step(
        self,
        task: base.Task,
        model: ModelState,
        image: list[Array],
        target: list[Array],
        average_share: Array,
    ) -> tuple[ModelState, Array]:
        """One step of the student; each source of samples is a batch for batch-norm."""
        tx = training.sgd(self.student_learning_rate, self.weight_decay)

        def objective(params: Tree) -> tuple[Array, Tree]:
            student, total = model.replace(params=params), 0.0
            for x, t, weight in zip(image, target, (1.0, average_share), strict=True):
                logits, batch_stats = task.student_logits(student, x)
                total += weight * self.student_loss(logits, t)
                student = student.replace(
                    batch_stats=trees.select(
                        jnp.asarray(weight > 0), batch_stats, student.batch_stats
                    )
                )
            return jnp.asarray(total), student.batch_stats

        (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
            model.params
        )
        update, _ = tx.update(gradient, tx.init(model.params), model.params)
        return ModelState(optax.apply_updates(model.params, update), batch_stats), loss


def _blend(old: Tree, new: Tree, weight: float) -> Any:
    """`weight` times `new` plus the rest of `old`."""
    return optax.incremental_update(new, old, weight)
