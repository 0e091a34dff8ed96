"""DENSE (Zhang et al., NeurIPS 2022): one-shot, from the mean of converged clients."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import flops, losses, parallel, prng, settings, trees
from mosaic_jax.data import augment
from mosaic_jax.distillation import base
from mosaic_jax.models import conditional
from mosaic_jax.types import (
    Array,
    DenseState,
    GeneratorState,
    ModelState,
    Teachers,
    Tree,
)


@dataclasses.dataclass(frozen=True)
class Dense(base.ServerTraining):
    """A fresh generator per epoch; its best batch joins a pool; an epoch on the pool.

    The teacher is the mean of the clients' logits. Generator and noise together
    minimise `class_weight CE(teacher, y) + statistics_weight L_bn + boundary_weight
    L_adv` on augmented samples; the student `T^2 KL(teacher / T || student / T)` on the
    pool. One round of server training is one epoch; `config.server.rounds` counts them.

    Reference: in the original code L_bn is 0, for its hooks find no batch-norm, and
    would be summed over clients; here it is the paper's mean over them.

    Attributes:
      generator_steps: in an epoch.
      batch_size: of samples and of the student's steps, B.
      pool: batches that are kept; then the oldest are replaced.
      latent_dim: of the noise.
      width: of the generator.
      generator_learning_rate: Adam(0.5, 0.999) over generator and noise.
      student_learning_rate: SGD.
      momentum: of the student's SGD.
      class_weight: lambda_oh.
      statistics_weight: lambda_bn.
      boundary_weight: lambda_adv.
      temperature: T.
    """

    generator_steps: int = settings.at_least(1)
    batch_size: int = settings.at_least(1)
    pool: int = settings.at_least(1)
    latent_dim: int = settings.at_least(1)
    width: int = settings.at_least(1)
    generator_learning_rate: float = settings.above(0)
    student_learning_rate: float = settings.above(0)
    momentum: float = settings.below_one()
    class_weight: float = settings.at_least(0)
    statistics_weight: float = settings.at_least(0)
    boundary_weight: float = settings.at_least(0)
    temperature: float = settings.above(0)

    def init(self, task: base.Task, model: ModelState, key: Array) -> DenseState:
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
        key: Array,
        number: Array,
    ) -> tuple[DenseState, ModelState, dict[str, Array]]:
        """One epoch."""
        del number
        image, g_loss = self._synthesise(
            task, model, teachers, prng.named(key, "generator")
        )
        slot = state.count % self.pool
        state = state.replace(
            image=state.image.at[slot].set(augment.to_uint8(image)),
            count=state.count + 1,
        )
        model, opt_state, s_loss = self._distil(
            task, state, model, teachers, prng.named(key, "student")
        )
        metrics = {"generator_loss": g_loss, "student_loss": s_loss}
        return state.replace(opt_state=opt_state), model, metrics

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """See the base class."""
        size, _, channels = task.image_shape
        module = conditional.DenseGenerator(size, channels, self.width, task.lowering)
        generator = base.generator_flops(module, jnp.zeros((1, self.latent_dim)))
        classifier = task.classifier.flops(task.image_shape)
        judged = num_teachers + bool(self.boundary_weight)
        made = self.generator_steps * (
            flops.TRAINED * generator + flops.THROUGH * judged * classifier
        )
        learned = (num_teachers + flops.TRAINED) * classifier
        batches = sum(min(number + 1, self.pool) for number in range(rounds))
        return self.batch_size * (rounds * made + batches * learned)

    def boundary_loss(self, student: Array, teacher: Array) -> Array:
        """L_adv of logits [B, K]: KL where the two disagree, divided by B."""
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
        """Mean logits [B, K] and L_bn."""

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
        self, task: base.Task, model: ModelState, teachers: Teachers, key: Array
    ) -> tuple[Array, Array]:
        """The signed batch of the lowest loss, and that loss."""
        size, _, channels = task.image_shape
        module = conditional.DenseGenerator(size, channels, self.width, task.lowering)
        tx = optax.adam(self.generator_learning_rate, b1=0.5, b2=0.999)
        z = jax.random.normal(prng.named(key, "z"), (self.batch_size, self.latent_dim))
        label = jax.random.randint(
            prng.named(key, "label"), (self.batch_size,), 0, task.num_classes
        )
        fresh = base.generator_state(module, tx, prng.named(key, "init"), z)
        variables = {"generator": fresh.model.params, "z": z}
        # The noise is trained as well.
        fresh = GeneratorState(
            fresh.model.replace(params=variables), tx.init(variables)
        )

        def step(i: Array, carry: Tree) -> Tree:
            state, best = carry

            def objective(params: Tree) -> tuple[Array, Tree]:
                generator = state.model.replace(params=params["generator"])
                image, updated = module.apply(
                    generator.variables,
                    params["z"],
                    train=True,
                    mutable=["batch_stats"],
                )
                loss = self._generator_loss(
                    task, model, teachers, image, label, prng.at(key, i)
                )
                return loss, (updated["batch_stats"], image)

            (loss, (batch_stats, image)), gradient = jax.value_and_grad(
                objective, has_aux=True
            )(state.model.params)
            update, opt_state = tx.update(gradient, state.opt_state)
            params = optax.apply_updates(state.model.params, update)
            best = trees.select(loss < best[1], (image, loss), best)
            return GeneratorState(ModelState(params, batch_stats), opt_state), best

        nothing = jnp.zeros((self.batch_size, *task.image_shape)), jnp.array(jnp.inf)
        _, best = jax.lax.fori_loop(0, self.generator_steps, step, (fresh, nothing))
        return best

    def _generator_loss(
        self,
        task: base.Task,
        model: ModelState,
        teachers: Teachers,
        image: Array,
        label: Array,
        key: Array,
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
        key: Array,
    ) -> tuple[ModelState, optax.OptState, Array]:
        """An epoch over the pool, in a new order."""
        pool = state.image.reshape(-1, *task.image_shape)
        num_batches = jnp.minimum(state.count, self.pool)
        noise = jax.random.uniform(prng.named(key, "order"), (len(pool),))
        there = jnp.arange(len(pool)) < num_batches * self.batch_size
        order = jnp.argsort(jnp.where(there, noise, 2.0))

        def step(i: Array, carry: Tree) -> Tree:
            model, opt_state, total = carry
            rows = jax.lax.dynamic_slice_in_dim(
                order, i * self.batch_size, self.batch_size
            )
            image = augment.augment(
                task.augmentation, prng.at(key, i), augment.to_signed(pool[rows])
            )
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
