"""FedFTG (Zhang et al., 2022): fine-tuning of the global model on hard samples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema, sharing, trees
from mosaic_jax.core.types import Array, GeneratorState, ModelState, Teachers, Tree
from mosaic_jax.fl import training
from mosaic_jax.nn import conditional, dcgan, losses
from mosaic_jax.server import base


@dataclasses.dataclass(frozen=True)
class FedFTG(base.ServerTraining):
    """A conditional generator of hard samples, and a class-wise ensemble as teacher.

    In each iteration labels are drawn with the class frequencies p of the clients. The
    generator takes one step for each client i in turn on `-mean(tau_iy KL(student ||
    client)) + class_weight mean(tau_iy CE(client, y)) + diversity_weight L_dis / m`.
    Then the student takes its steps, on the same samples, on the cross-entropy with
    `sum_i tau_iy softmax(client_i)`.

    Reference: `published` is for the differences of the official code: the mean
    absolute difference of logits instead of KL, with no gradient through the client's;
    separate means of CE and tau; the student's loss divided by K.
    """

    iterations: int = schema.at_least(0, default=10, meaning="in a round")
    student_steps: int = schema.at_least(1, default=5, meaning="in an iteration")
    batch_size: int = schema.at_least(1, default=64, meaning="samples, B")
    latent_dim: int = schema.at_least(1, default=100, meaning="of the noise")
    width: int = schema.at_least(1, default=64, meaning="of the generator")
    generator_learning_rate: float = schema.above(0, default=0.01, meaning="Adam")
    student_learning_rate: float = schema.above(0, default=0.01, meaning="SGD")
    weight_decay: float = schema.at_least(0, default=1e-4, meaning="L2 of the student")
    class_weight: float = schema.at_least(0, default=1.0, meaning="lambda_cls")
    diversity_weight: float = schema.at_least(0, default=1.0, meaning="lambda_dis")
    published: bool = schema.anything(
        default=False, meaning="losses as in the official code"
    )

    def init(
        self, task: base.Task, model: ModelState, key: jax.Array
    ) -> GeneratorState:
        """An initial generator."""
        del model
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        return base.generator_state(self._module(task), self._tx, key, z, label)

    def train(
        self,
        task: base.Task,
        state: GeneratorState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[GeneratorState, ModelState, dict[str, Array]]:
        """Iterations of generator and student steps."""
        del number
        tau, share = base.class_shares(teachers.label_count)

        def iteration(i: Array, carry: Tree) -> Tree:
            state, model, total = carry
            at = prng.at(key, i)
            label = base.draw_labels(prng.named(at, "label"), share, self.batch_size)
            z = jax.random.normal(
                prng.named(at, "z"), (self.batch_size, self.latent_dim)
            )
            z, label = sharing.spread((z, label))
            state, g_loss = self._generator_steps(
                task, state, model, teachers, tau, z, label
            )
            model, s_loss = self._student_steps(
                task, state, model, teachers, tau, z, label
            )
            return state, model, total + jnp.stack([g_loss, s_loss])

        state, model, total = jax.lax.fori_loop(
            0, self.iterations, iteration, (state, model, jnp.zeros(2))
        )
        total = total / max(self.iterations, 1)
        return state, model, {"generator_loss": total[0], "student_loss": total[1]}

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes."""
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        generator = base.generator_flops(self._module(task), z, label)
        classifier = task.classifier.flops(task.image_shape)
        # A generator step against each client in turn, judged by it and the student.
        made = num_teachers * (
            flops.TRAINED * generator + 2 * flops.THROUGH * classifier
        )
        learned = (num_teachers + self.student_steps * flops.TRAINED) * classifier
        each = self.batch_size * (made + generator + learned)
        return rounds * self.iterations * each

    def generator_loss(
        self,
        student: Array,
        teacher: Array,
        label: Array,
        weight: Array,
        diversity: Array,
        num_clients: int,
    ) -> Array:
        """The generator's loss for one client.

        Args:
          student: logits [B, K] of the global model.
          teacher: logits [B, K] of the client.
          label: [B] int32, that the samples were generated for.
          weight: tau_iy, [B].
          diversity: L_dis, [].
          num_clients: m.
        """
        each = optax.losses.softmax_cross_entropy_with_integer_labels(teacher, label)
        if self.published:
            apart = jnp.abs(student - jax.lax.stop_gradient(teacher)).mean(axis=-1)
            classified = jnp.mean(each) * jnp.mean(weight)
        else:
            apart = losses.kl(student, teacher)
            classified = jnp.mean(weight * each)
        return (
            -jnp.mean(weight * apart)
            + self.class_weight * classified
            + self.diversity_weight * diversity / num_clients
        )

    def student_loss(self, student: Array, target: Array) -> Array:
        """Cross-entropy of logits [B, K] with `sum_i tau_iy softmax t_i` [B, K]."""
        each = -jnp.sum(target * jax.nn.log_softmax(student), axis=-1)
        return jnp.mean(each) / (student.shape[-1] if self.published else 1)

    @property
    def _tx(self) -> optax.GradientTransformation:
        return optax.adam(self.generator_learning_rate)

    def _module(self, task: base.Task) -> conditional.FedFTGGenerator:
        size, channels = dcgan.side_of(task.image_shape), task.image_shape[-1]
        return conditional.FedFTGGenerator(
            size, channels, task.num_classes, self.width, task.lowering
        )

    def _generator_steps(
        self,
        task: base.Task,
        state: GeneratorState,
        model: ModelState,
        teachers: Teachers,
        tau: Array,
        z: Array,
        label: Array,
    ) -> tuple[GeneratorState, Array]:
        module, classifier = self._module(task), task.classifier
        there = base.teaches(teachers)
        # Exactly 1 if all clients have labels.
        scale = len(tau) / jnp.maximum(jnp.sum(there), 1)

        def against(state: GeneratorState, i: Array) -> tuple[GeneratorState, Array]:
            client_model, share = trees.take((teachers.client_model, tau), i)

            def objective(params: Tree) -> tuple[Array, Tree]:
                variables = state.model.replace(params=params).variables
                image, updated = module.apply(
                    variables, z, label, train=True, mutable=["batch_stats"]
                )
                diversity = scale * losses.pairwise_diversity(image, z, power=1)
                image = classifier.denormalise(image)
                loss = self.generator_loss(
                    classifier.logits(model, image),
                    classifier.logits(client_model, image),
                    label,
                    share[label],
                    diversity,
                    len(tau),
                )
                return loss, updated["batch_stats"]

            stepped, loss = base.generator_step(self._tx, state, objective)
            return trees.select(there[i], stepped, state), loss

        turns = jnp.argsort(teachers.number)
        state, loss = jax.lax.scan(against, state, turns)
        return state, base.mean_over_teachers(loss[jnp.argsort(turns)], teachers)

    def _student_steps(
        self,
        task: base.Task,
        state: GeneratorState,
        model: ModelState,
        teachers: Teachers,
        tau: Array,
        z: Array,
        label: Array,
    ) -> tuple[ModelState, Array]:
        variables = state.model.variables
        output: Any = self._module(task).apply(variables, z, label, train=False)
        image = task.classifier.denormalise(output)
        logits = base.client_logits(task, teachers.client_model, image)
        target = jnp.einsum("mb,mbk->bk", tau[:, label], jax.nn.softmax(logits))
        tx = training.sgd(self.student_learning_rate, self.weight_decay)

        def step(
            number: Array, carry: tuple[ModelState, Array]
        ) -> tuple[ModelState, Array]:
            del number
            model, total = carry
            model, _, loss = base.student_step(
                task,
                tx,
                model,
                tx.init(model.params),
                image,
                lambda logits: self.student_loss(logits, target),
            )
            return model, total + loss

        model, total = jax.lax.fori_loop(
            0, self.student_steps, step, (model, jnp.zeros(()))
        )
        return model, total / self.student_steps
