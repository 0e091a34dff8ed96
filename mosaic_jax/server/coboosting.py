"""Co-Boosting (Dai et al., 2024): hard samples and client weights boost each other."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema, sharing
from mosaic_jax.core.types import Array, CoBoostingState, ModelState, Teachers, Tree
from mosaic_jax.data import augment
from mosaic_jax.nn import losses
from mosaic_jax.server import base, pool

# Of the softmax whose random direction an image is moved along (Tashiro et al., 2020).
MOVE_TEMPERATURE = 4.0


@dataclasses.dataclass(frozen=True)
class CoBoosting(base.ServerTraining):
    """Distillation of a weighted ensemble on a growing pool of hard samples.

    The teacher is `A(x) = sum_i w_i f_i(x) / sum_i w_i`. Every round

    - trains a new generator and its noise on `class_weight mean((1 - p_y)^hardness
      CE(A, y)) - boundary_weight T_b^2 KL(A / T_b || f / T_b)`, where p_y is what the
      teacher gives to the label, a constant, and f the student;
    - goes once through the pool, and for each batch moves w_i by `weight_step
      weight_step_decay^round` against the sign of its gradient of CE(A, y), within
      [0, 1];
    - adds the generator's best batch to the pool, and trains the student for an epoch
      on `T^2 KL(A / T || f / T)`. Of each image every pixel is moved before by `move`,
      up or down, whichever raises `<u, softmax(A / 4)>` for a random u.
    """

    when = "once"

    generator_steps: int = schema.at_least(1, default=30, meaning="in a round")
    batch_size: int = schema.at_least(
        1, default=128, meaning="of samples and of the student's steps, B"
    )
    pool: int = schema.at_least(
        1, default=200, meaning="batches that are kept; then the oldest are replaced"
    )
    latent_dim: int = schema.at_least(1, default=256, meaning="of the noise")
    width: int = schema.at_least(1, default=64, meaning="of the generator")
    generator_learning_rate: float = schema.above(
        0, default=1e-3, meaning="Adam(0.5, 0.999) over generator and noise"
    )
    class_weight: float = schema.at_least(0, default=1.0, meaning="of hard labels")
    hardness: float = schema.at_least(
        0, default=1.0, meaning="power of 1 - p_y; 0: plain cross-entropy"
    )
    boundary_weight: float = schema.at_least(
        0, default=1.0, meaning="of what student and teacher disagree on"
    )
    boundary_temperature: float = schema.above(0, default=3.0, meaning="T_b")
    weight_step: float = schema.at_least(
        0, default=0.01, meaning="mu, of the clients' weights; 0: equal weights"
    )
    weight_step_decay: float = schema.between(
        0, 1, default=0.99, meaning="factor of weight_step from round to round"
    )
    move: float = schema.at_least(
        0, default=8 / 255, meaning="of a pixel, on a scale of 1; 0: none"
    )
    student_learning_rate: float = schema.above(
        0, default=0.01, meaning="SGD; falls to 0 by half a cosine over all rounds"
    )
    momentum: float = schema.below_one(default=0.9, meaning="of the student's SGD")
    weight_decay: float = schema.at_least(0, default=1e-4, meaning="L2 of the student")
    temperature: float = schema.above(0, default=4.0, meaning="T")
    largest_gradient: float = schema.above(
        0, default=10.0, meaning="norm to which gradients are cut"
    )

    def init(
        self, task: base.Task, model: ModelState, key: jax.Array
    ) -> CoBoostingState:
        """An empty pool, and equal weights."""
        del key
        shape = (self.pool, self.batch_size)
        return CoBoostingState(
            image=jnp.zeros((*shape, *task.image_shape), jnp.uint8),
            label=jnp.zeros(shape, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            weight=jnp.full(task.num_clients, 1 / task.num_clients),
            opt_state=self._student_tx(task, jnp.zeros((), jnp.int32)).init(
                model.params
            ),
        )

    def train(
        self,
        task: base.Task,
        state: CoBoostingState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[CoBoostingState, ModelState, dict[str, Array]]:
        """One round: a batch, the weights, then an epoch of the student."""
        weight = jnp.asarray(state.weight)[teachers.number]
        image, label, g_loss = self._synthesise(
            task, weight, model, teachers, prng.named(key, "generator")
        )
        weight = self._reweigh(
            task, state, weight, teachers, prng.named(key, "weights"), number
        )
        slot = state.count % self.pool
        state = state.replace(
            image=pool.with_batch(state.image, state.count, image),
            label=jnp.asarray(state.label).at[slot].set(label),
            count=state.count + 1,
            weight=jnp.asarray(state.weight).at[teachers.number].set(weight),
        )
        model, opt_state, s_loss = self._distil(
            task, state, weight, model, teachers, prng.named(key, "student"), number
        )
        metrics = {"generator_loss": g_loss, "student_loss": s_loss}
        return state.replace(opt_state=opt_state), model, metrics

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes."""
        generator = pool.generator_flops(task, self.latent_dim, self.width)
        classifier = task.classifier.flops(task.image_shape)
        made = self.generator_steps * (
            flops.TRAINED * generator + flops.THROUGH * (num_teachers + 1) * classifier
        )
        # The teacher judges an image of the pool for the weights; then it moves the
        # image, and judges it again for the student.
        weighed = num_teachers * classifier
        moved = flops.THROUGH * num_teachers * classifier if self.move else 0
        learned = moved + (num_teachers + flops.TRAINED) * classifier
        before = sum(min(number, self.pool) for number in range(rounds))
        after = sum(min(number + 1, self.pool) for number in range(rounds))
        return self.batch_size * (rounds * made + before * weighed + after * learned)

    def generator_loss(self, student: Array, teacher: Array, label: Array) -> Array:
        """The generator's loss.

        Args:
          student: logits [B, K].
          teacher: logits [B, K] of the ensemble.
          label: [B] int32, that the samples are to be taken for.
        """
        each = optax.losses.softmax_cross_entropy_with_integer_labels(teacher, label)
        difficulty = (1 - jnp.exp(-jax.lax.stop_gradient(each))) ** self.hardness
        apart = _scaled_kl(teacher, student, self.boundary_temperature)
        hard = jnp.mean(difficulty * each)
        return self.class_weight * hard - self.boundary_weight * apart

    def student_loss(self, student: Array, teacher: Array) -> Array:
        """`T^2 KL` of logits [B, K]."""
        return _scaled_kl(teacher, student, self.temperature)

    def moved(
        self, task: base.Task, teachers: Teachers, weight: Array, image: Array, u: Array
    ) -> Array:
        """Images, each moved towards where the teacher answers otherwise.

        Args:
          task: properties of the study.
          teachers: the clients' models.
          weight: [m], of the clients.
          image: signed images [B, H, W, D].
          u: direction [B, K] of the answers.

        Returns:
          [B, H, W, D], by up to 2 `move` out of [-1, 1].
        """

        def answer(image: Array) -> Array:
            logits = _teach(task, teachers, weight, image) / MOVE_TEMPERATURE
            return jnp.sum(u * jax.nn.softmax(logits))

        # Signed images have a scale of 2.
        return image + 2 * self.move * jnp.sign(jax.grad(answer)(image))

    def _student_tx(
        self, task: base.Task, number: Array
    ) -> optax.GradientTransformation:
        rate = base.annealed(self.student_learning_rate, task.rounds)(number)
        return optax.chain(
            optax.clip_by_global_norm(self.largest_gradient),
            optax.add_decayed_weights(self.weight_decay),
            optax.trace(self.momentum),
            optax.scale(-jnp.asarray(rate)),
        )

    def _synthesise(
        self,
        task: base.Task,
        weight: Array,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
    ) -> tuple[Array, Array, Array]:
        """The best batch of signed images, their labels, and its loss."""
        label = jax.random.randint(
            prng.named(key, "label"), (self.batch_size,), 0, task.num_classes
        )

        def loss_of(image: Array, i: Array) -> Array:
            del i
            teacher = _teach(task, teachers, weight, image)
            return self.generator_loss(
                task.classifier.logits(model, image), teacher, label
            )

        image, loss = pool.best_batch(
            task,
            loss_of,
            key,
            steps=self.generator_steps,
            noise_shape=(self.batch_size, self.latent_dim),
            width=self.width,
            tx=optax.chain(
                optax.clip_by_global_norm(self.largest_gradient),
                optax.adam(self.generator_learning_rate, b1=0.5, b2=0.999),
            ),
        )
        return image, label, loss

    def _reweigh(
        self,
        task: base.Task,
        state: CoBoostingState,
        weight: Array,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> Array:
        """The clients' weights [m] after an epoch of the pool of the rounds before."""
        images, labels, rows, num_batches = _batches(
            task, state, prng.named(key, "order")
        )
        step_size = self.weight_step * self.weight_step_decay**number

        def step(i: Array, weight: Array) -> Array:
            batch = sharing.spread(rows[i])
            image = _augmented(task, prng.at(key, i), images[batch])
            logits = base.client_logits(task, teachers.client_model, image)

            def loss(weight: Array) -> Array:
                teacher = _ensemble(weight, logits, teachers)
                return losses.cross_entropy(teacher, labels[batch])

            gradient = jax.grad(loss)(weight)
            return jnp.clip(weight - step_size * jnp.sign(gradient), 0, 1)

        return jax.lax.fori_loop(0, num_batches, step, weight)

    def _distil(
        self,
        task: base.Task,
        state: CoBoostingState,
        weight: Array,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[ModelState, optax.OptState, Array]:
        """Train the student for an epoch on the pool, in random order."""
        images, _, rows, num_batches = _batches(task, state, prng.named(key, "order"))
        tx = self._student_tx(task, number)
        shape = (self.batch_size, task.num_classes)

        def step(i: Array, carry: Tree) -> Tree:
            model, opt_state, total = carry
            image = images[sharing.spread(rows[i])]
            image = _augmented(task, prng.at(key, i), image)
            if self.move:
                u_key = prng.at(prng.named(key, "direction"), i)
                u = jax.random.uniform(u_key, shape, minval=-1.0)
                image = self.moved(task, teachers, weight, image, u)
            teacher = _teach(task, teachers, weight, image)
            model, opt_state, loss = base.student_step(
                task,
                tx,
                model,
                opt_state,
                image,
                lambda logits: self.student_loss(logits, teacher),
            )
            return model, opt_state, total + loss

        start = (model, state.opt_state, jnp.zeros(()))
        model, opt_state, total = jax.lax.fori_loop(0, num_batches, step, start)
        return model, opt_state, total / num_batches


def _ensemble(weight: Array, logits: Array, teachers: Teachers) -> Array:
    """Mean [B, K] of the clients' logits [m, B, K] by `weight` [m]."""
    there = base.teaches(teachers)
    weight = jnp.where(there, weight, 0)
    weight = weight / jnp.maximum(jnp.sum(weight), 1e-12)
    logits = jnp.where(there[:, None, None], logits, 0)
    return jnp.einsum("m,mbk->bk", weight, logits)


def _teach(task: base.Task, teachers: Teachers, weight: Array, image: Array) -> Array:
    """The teacher's logits [B, K] of signed images."""
    logits = base.client_logits(task, teachers.client_model, image)
    return _ensemble(weight, logits, teachers)


def _batches(
    task: base.Task, state: CoBoostingState, key: jax.Array
) -> tuple[Array, Array, Array, Array]:
    """All images and labels of the pool, and the rows of an epoch of it."""
    images = jnp.asarray(state.image).reshape(-1, *task.image_shape)
    labels = jnp.asarray(state.label).reshape(-1)
    return images, labels, *pool.epoch(state.image, state.count, key)


def _augmented(task: base.Task, key: jax.Array, image: Array) -> Array:
    """Signed images of those of the pool, augmented as training images are."""
    return augment.augment(task.augmentation, key, augment.to_signed(image))


def _scaled_kl(teacher: Array, student: Array, temperature: float) -> Array:
    """`T^2 KL(teacher / T || student / T)` of logits [B, K], mean over samples."""
    scaled = teacher / temperature, student / temperature
    return temperature**2 * jnp.mean(losses.kl(*scaled))
