"""DENSE (Zhang et al., 2022): one-shot distillation of the mean of the clients."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema, sharing
from mosaic_jax.core.types import Array, DenseState, ModelState, Teachers, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import parallel
from mosaic_jax.nn import losses
from mosaic_jax.server import base, pool


@dataclasses.dataclass(frozen=True)
class Dense(base.ServerTraining):
    """Distillation on a growing pool of synthetic batches.

    Every round trains a new generator, adds its best batch to the pool and trains the
    student for an epoch on the pool. The teacher is the mean of the clients' logits.
    Generator and noise minimise `class_weight CE(teacher, y) + statistics_weight L_bn +
    boundary_weight L_adv` on augmented samples, the student minimises `T^2 KL(teacher /
    T || student / T)`.

    Reference: in the original code L_bn is 0, because its hooks find no batch-norm, and
    would be a sum over clients; here it is the mean over them, as in the paper.
    """

    when = "once"

    generator_steps: int = schema.at_least(1, default=30, meaning="in an epoch")
    batch_size: int = schema.at_least(
        1, default=256, meaning="of samples and of the student's steps, B"
    )
    pool: int = schema.at_least(
        1, default=200, meaning="batches that are kept; then the oldest are replaced"
    )
    latent_dim: int = schema.at_least(1, default=256, meaning="of the noise")
    width: int = schema.at_least(1, default=64, meaning="of the generator")
    generator_learning_rate: float = schema.above(
        0, default=1e-3, meaning="Adam(0.5, 0.999) over generator and noise"
    )
    student_learning_rate: float = schema.above(0, default=0.005, meaning="SGD")
    momentum: float = schema.below_one(default=0.9, meaning="of the student's SGD")
    class_weight: float = schema.at_least(0, default=1.0, meaning="lambda_oh")
    statistics_weight: float = schema.at_least(0, default=1.0, meaning="lambda_bn")
    boundary_weight: float = schema.at_least(0, default=0.5, meaning="lambda_adv")
    temperature: float = schema.above(0, default=20.0, meaning="T")

    def init(self, task: base.Task, model: ModelState, key: jax.Array) -> DenseState:
        """An empty pool."""
        del key
        shape = (self.pool, self.batch_size, *task.image_shape)
        return DenseState(
            image=jnp.zeros(shape, jnp.uint8),
            count=jnp.zeros((), jnp.int32),
            opt_state=self._student_tx.init(model.params),
        )

    def train(
        self,
        task: base.Task,
        state: DenseState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[DenseState, ModelState, dict[str, Array]]:
        """One round: a new batch for the pool, and an epoch of the student on it."""
        del number
        image, g_loss = self._synthesise(
            task, model, teachers, prng.named(key, "generator")
        )
        state = state.replace(
            image=pool.with_batch(state.image, state.count, image),
            count=state.count + 1,
        )
        model, opt_state, s_loss = self._distil(
            task, state, model, teachers, prng.named(key, "student")
        )
        metrics = {"generator_loss": g_loss, "student_loss": s_loss}
        return state.replace(opt_state=opt_state), model, metrics

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes."""
        generator = pool.generator_flops(task, self.latent_dim, self.width)
        classifier = task.classifier.flops(task.image_shape)
        judged = num_teachers + bool(self.boundary_weight)
        made = self.generator_steps * (
            flops.TRAINED * generator + flops.THROUGH * judged * classifier
        )
        learned = (num_teachers + flops.TRAINED) * classifier
        batches = sum(min(number + 1, self.pool) for number in range(rounds))
        return self.batch_size * (rounds * made + batches * learned)

    def boundary_loss(self, student: Array, teacher: Array) -> Array:
        """L_adv of logits [B, K]: -KL over samples where the two disagree, over B."""
        disagree = jnp.argmax(student, -1) != jnp.argmax(teacher, -1)
        return -jnp.mean(jnp.where(disagree, losses.kl(teacher, student), 0))

    def student_loss(self, student: Array, teacher: Array) -> Array:
        """`T^2 KL` of logits [B, K]."""
        scaled = teacher / self.temperature, student / self.temperature
        return self.temperature**2 * jnp.mean(losses.kl(*scaled))

    @property
    def _student_tx(self) -> optax.GradientTransformation:
        return optax.sgd(self.student_learning_rate, self.momentum or None)

    def _teacher(
        self, task: base.Task, teachers: Teachers, image: Array
    ) -> tuple[Array, Array]:
        """The teacher's logits [B, K] and L_bn."""

        def one(client_model: ModelState) -> tuple[Array, Array]:
            if not client_model.batch_stats:
                return task.classifier.logits(client_model, image), jnp.zeros(())
            logits, moments = task.classifier.logits_and_moments(client_model, image)
            return logits, losses.statistics_distance(moments, client_model.batch_stats)

        logits, distance = parallel.expert_map(one, teachers.client_model)
        return (
            base.mean_over_teachers(logits, teachers),
            base.mean_over_teachers(distance, teachers),
        )

    def _synthesise(
        self, task: base.Task, model: ModelState, teachers: Teachers, key: jax.Array
    ) -> tuple[Array, Array]:
        """The batch of signed images with the lowest loss, and that loss."""
        label = jax.random.randint(
            prng.named(key, "label"), (self.batch_size,), 0, task.num_classes
        )
        return pool.best_batch(
            task,
            lambda image, i: self._generator_loss(
                task, model, teachers, image, label, prng.at(key, i)
            ),
            key,
            steps=self.generator_steps,
            noise_shape=(self.batch_size, self.latent_dim),
            width=self.width,
            tx=optax.adam(self.generator_learning_rate, b1=0.5, b2=0.999),
        )

    def _generator_loss(
        self,
        task: base.Task,
        model: ModelState,
        teachers: Teachers,
        image: Array,
        label: Array,
        key: jax.Array,
    ) -> Array:
        image = augment.augment(task.augmentation, key, image)
        teacher, distance = self._teacher(task, teachers, image)
        loss = self.class_weight * losses.cross_entropy(teacher, label)
        loss += self.statistics_weight * distance
        if self.boundary_weight:
            student = task.classifier.logits(model, image)
            loss += self.boundary_weight * self.boundary_loss(student, teacher)
        return loss

    def _distil(
        self,
        task: base.Task,
        state: DenseState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
    ) -> tuple[ModelState, optax.OptState, Array]:
        """Train the student for an epoch on the pool, in random order."""
        images = jnp.asarray(state.image).reshape(-1, *task.image_shape)
        rows, num_batches = pool.epoch(
            state.image, state.count, prng.named(key, "order")
        )

        def step(i: Array, carry: Tree) -> Tree:
            model, opt_state, total = carry
            image = augment.to_signed(images[sharing.spread(rows[i])])
            image = augment.augment(task.augmentation, prng.at(key, i), image)
            teacher = base.mean_over_teachers(
                base.client_logits(task, teachers.client_model, image), teachers
            )
            model, opt_state, loss = base.student_step(
                task,
                self._student_tx,
                model,
                opt_state,
                image,
                lambda logits: self.student_loss(logits, teacher),
            )
            return model, opt_state, total + loss

        start = (model, state.opt_state, jnp.zeros(()))
        model, opt_state, total = jax.lax.fori_loop(0, num_batches, step, start)
        return model, opt_state, total / num_batches
