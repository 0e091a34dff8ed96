"""Mosaic's training of the global model: the ensemble teaches on generated images."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng, schema, sharing
from mosaic_jax.core.types import Array, LabelledImages, ModelState, Teacher, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import gan, parallel
from mosaic_jax.nn import losses
from mosaic_jax.server import base, mosaic

TRANSLATE_PIXELS = 2
# A client counts as holding a class from this part of an equal share of its labels on:
# a generator does not learn to draw what it has seen a few times.
HELD_FROM = 0.1


@dataclasses.dataclass(frozen=True)
class DistillSettings(schema.Group):
    """How the student learns."""

    source: str = schema.one_of(
        ("generated", "validation"),
        default="generated",
        meaning="validation: an upper bound, on held-out real images",
    )
    steps: int = schema.at_least(1, default=1500, meaning="of Adam")
    samples_per_generator: int = schema.at_least(
        1, default=32, meaning="images of each client's generator in a step"
    )
    pool: int = schema.at_least(
        0,
        default=0,
        meaning="images of each generator, drawn once and shown to the teacher once;"
        " 0: new ones in every step",
    )
    weighting: str = schema.one_of(
        ("uniform", "size"), default="uniform", meaning="of clients; size: by n_i"
    )
    own_classes: bool = schema.anything(
        default=False,
        meaning="leave out images on which the teacher names a class that their client"
        " does not hold",
    )
    balanced: bool = schema.anything(
        default=False,
        meaning="weigh images so that classes count by their labels' shares",
    )
    focus: float = schema.at_least(
        0,
        default=0.0,
        meaning="> 0: power of the divergence from the student that images count by",
    )
    min_confidence: float = schema.below_one(
        default=0.0, meaning="images of a less sure teacher are left out"
    )
    augment: str = schema.one_of(
        ("none", "data", "translate"),
        default="none",
        meaning="of generated images; data: as real training images",
    )
    learning_rate: float = schema.above(0, default=1e-4, meaning="of Adam")
    schedule: str = schema.one_of(
        ("constant", "cosine"), default="constant", meaning="of the learning rate"
    )
    temperature: float = schema.above(0, default=1.0, meaning="T")
    alpha: float = schema.between(0, 1, default=0.8, meaning="share of the soft target")
    beta: float = schema.at_least(0, default=1.0, meaning="weight of the divergence")
    divergence: str = schema.component(
        losses.DIVERGENCES,
        default="jsd",
        meaning="of student and teacher; logit_mean: as the published code computes it",
    )
    batch_norm: str = schema.one_of(
        ("eval", "train"), default="eval", meaning="of the student"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Held-out images are there where they are asked for; they are no pool."""
        if self.source == "validation" and study.data.validation == 0:
            yield (
                "data.validation = 0.0: must be > 0 for distill.source = 'validation'"
            )
        if self.source == "validation" and self.pool:
            yield (
                f"distill.pool = {self.pool}: must be 0 for distill.source ="
                " 'validation', whose images are all there"
            )
        if 0 < self.pool < self.samples_per_generator:
            yield (
                f"distill.pool = {self.pool}: must be 0, or >="
                f" distill.samples_per_generator = {self.samples_per_generator}"
            )


@flax.struct.dataclass
class Pool:
    """Generated images that the teacher has seen.

    Attributes:
      image: uint8 [C, P, H, W, D], P of each client's generator.
      logits: float32 [C, P, K], the teacher's.
      weight: float32 [C * P], what the images count; () before all are drawn.
    """

    image: Array
    logits: Array
    weight: Tree = ()


@flax.struct.dataclass
class EnsembleAndGenerators:
    """What teaches the student.

    Attributes:
      teacher: experts and head.
      generators: of the clients, [C, ...].
      weight: [C], of each client's samples; 0: its generator has collapsed.
      label_count: [C, K], images of each class at each client.
      pool: a `Pool`, () where images are drawn in every step.
      held_out: real images that no client holds, read where `source` is "validation".
    """

    teacher: Teacher
    generators: ModelState
    weight: Array
    label_count: Array
    pool: Tree
    held_out: dict[str, LabelledImages]


@dataclasses.dataclass(frozen=True)
class Distillation(base.ServerTraining):
    """Steps of Adam on what the teacher says of generated images (Mosaic, stage 7).

    Attributes:
      config: how the student learns.
      ensemble: how the teacher's experts become one prediction.
      model_gan: whose generators draw the images.
      num_clients: C.
    """

    config: DistillSettings
    ensemble: mosaic.Ensemble
    model_gan: gan.Gan
    num_clients: int

    @property
    def samples(self) -> int:
        """Images in a step."""
        return self.num_clients * self.config.samples_per_generator

    def init(self, task: base.Task, model: ModelState, key: Array) -> Tree:
        """Adam's state."""
        del task, key
        return self._tx.init(model.params)

    def train(
        self,
        task: base.Task,
        state: Tree,
        model: ModelState,
        teachers: EnsembleAndGenerators,
        key: Array,
        number: Array,
    ) -> tuple[Tree, ModelState, dict[str, Array]]:
        """One step; see the base class. Metrics are means over the batch."""
        del number
        image, target, weight = self._batch(task, key, teachers)
        if self.config.focus:
            apart = losses.jensen_shannon(task.classifier.logits(model, image), target)
            weight = weight * apart**self.config.focus
        # No sample may be sure enough: a batch of weight 0 then changes nothing.
        weight = weight / jnp.maximum(jnp.sum(weight), 1e-12)

        def objective(params: Tree) -> tuple[Array, tuple[Tree, Array]]:
            logits, batch_stats = task.student_logits(
                model.replace(params=params), image, weight > 0
            )
            loss = losses.distillation(
                logits,
                target,
                temperature=self.config.temperature,
                alpha=self.config.alpha,
                beta=self.config.beta,
                divergence=self.config.divergence,
                weight=weight,
            )
            return loss, (batch_stats, logits)

        (loss, (batch_stats, logits)), gradient = jax.value_and_grad(
            objective, has_aux=True
        )(model.params)
        update, state = self._tx.update(gradient, state, model.params)
        params = optax.apply_updates(model.params, update)
        agreement = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
        confidence = jnp.max(jax.nn.softmax(target), axis=-1)
        metrics = {
            "loss": loss,
            "agreement": jnp.sum(agreement * weight),
            "confidence": jnp.sum(confidence * weight),
        }
        return state, ModelState(params, batch_stats), metrics

    @property
    def _tx(self) -> optax.GradientTransformation:
        rate: Any = self.config.learning_rate
        if self.config.schedule == "cosine":
            rate = optax.cosine_decay_schedule(rate, self.config.steps)
        return optax.adam(rate)

    def fill(
        self, pool: Pool, teachers: EnsembleAndGenerators, key: Array, number: Array
    ) -> Pool:
        """The pool with the images of step `number` of drawing it.

        Args:
          pool: after the step before.
          teachers: what teaches the student.
          key: random key of the step.
          number: [] int32; a step draws `samples_per_generator` images of each client.
        """
        image = self._drawn(teachers, key)
        logits = self.ensemble.logits(teachers.teacher, image)
        first = number * self.config.samples_per_generator

        # The last step's images overlap those of the one before where they must.
        def put(old: Array, new: Array) -> Array:
            new = new.reshape(self.num_clients, -1, *new.shape[1:])
            return jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=1)

        return Pool(
            image=put(pool.image, augment.to_uint8(image)),
            logits=put(pool.logits, logits),
        )

    def filled(self, pool: Pool, teachers: EnsembleAndGenerators) -> Pool:
        """The pool whose images are all drawn, with what each of them counts.

        Where none would count, all images of living generators do: the student learns
        what the teacher says of them, as without conditions.
        """
        logits = pool.logits.reshape(-1, pool.logits.shape[-1])
        client = jnp.repeat(jnp.arange(self.num_clients), pool.logits.shape[1])
        weight = self._counts(teachers, logits, client)
        weight = jnp.where(jnp.any(weight > 0), weight, teachers.weight[client])
        return dataclasses.replace(pool, weight=weight)

    def _counts(
        self, teachers: EnsembleAndGenerators, logits: Array, client: Array
    ) -> Array:
        """What generated images count, [B], by the teacher's logits and their client.

        Args:
          teachers: what teaches the student.
          logits: [B, K] of the teacher.
          client: [B] int32, whose generator drew each image.
        """
        weight = teachers.weight[client] * self._is_sure(logits)
        if self.config.own_classes:
            named = jnp.argmax(logits, axis=-1)
            weight = weight * holds(teachers.label_count)[client, named]
        if self.config.balanced:
            held = jnp.sum(jnp.asarray(teachers.label_count, jnp.float32), axis=0)
            weight = by_class(weight, logits, held / jnp.sum(held))
        return weight

    def _is_sure(self, logits: Array) -> Array:
        """Whether the teacher with `logits` [B, K] is sure enough, [B] bool."""
        confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
        return confidence >= self.config.min_confidence

    def _batch(
        self, task: base.Task, key: Array, teachers: EnsembleAndGenerators
    ) -> tuple[Array, Array, Array]:
        """Signed images [B, H, W, D] of all clients, and for each of them the teacher's
        logits [B, K] and the weight [B].

        The teacher of a pool has seen the images as they were drawn; images of a pool
        are drawn by what they count, all others are weighted by it.
        """
        if self.config.pool:
            image, logits = self._from_pool(teachers.pool, prng.named(key, "rows"))
            image = self._augmented(task, key, image)
            return image, logits, jnp.ones(len(image))
        if self.config.source == "validation":
            # An upper bound, not the method: real images that no client holds.
            real = teachers.held_out["validation"].image
            shape = (self.samples,)
            rows = jax.random.randint(prng.named(key, "rows"), shape, 0, len(real))
            image = augment.to_signed(real[sharing.spread(rows)])
            image = self._augmented(task, key, image)
            logits = self.ensemble.logits(teachers.teacher, image)
            return image, logits, self._is_sure(logits).astype(jnp.float32)
        image = self._drawn(teachers, prng.named(key, "z"))
        image = self._augmented(task, key, image)
        logits = self.ensemble.logits(teachers.teacher, image)
        each = self.config.samples_per_generator
        client = jnp.repeat(jnp.arange(self.num_clients), each)
        return image, logits, self._counts(teachers, logits, client)

    def _from_pool(self, pool: Pool, key: Array) -> tuple[Array, Array]:
        """Signed images [B, H, W, D], drawn by what they count, and their logits."""
        count, shape = self.num_clients * self.config.pool, (self.samples,)
        rows = jax.random.choice(key, count, shape, p=pool.weight)
        client, place = jnp.divmod(sharing.spread(rows), self.config.pool)
        image = augment.to_signed(pool.image[client, place])
        return image, pool.logits[client, place]

    def _augmented(self, task: base.Task, key: Array, image: Array) -> Array:
        key = prng.named(key, "augment")
        if self.config.augment == "data":
            return augment.augment(task.augmentation, key, image)
        if self.config.augment == "translate":
            return augment.translate(key, image, pixels=TRANSLATE_PIXELS)
        return image

    def _drawn(self, teachers: EnsembleAndGenerators, key: Array) -> Array:
        return generate(
            self.model_gan,
            teachers.generators,
            key,
            self.config.samples_per_generator,
            self.num_clients,
        )


def by_class(weight: Array, logits: Array, class_share: Array) -> Array:
    """Weights [B] whose sums over the images of a class are its share.

    Classes that the teacher sees on none of the images have no part.

    Args:
      weight: [B], of the images within their class.
      logits: [B, K] of the teacher, who tells the class.
      class_share: [K], sums to 1.
    """
    named = jnp.argmax(logits, axis=-1)
    total = jnp.zeros(len(class_share)).at[named].add(weight)
    return weight * (class_share / jnp.maximum(total, 1e-12))[named]


def holds(label_count: Array) -> Array:
    """Which classes each client counts as holding, [C, K] bool.

    Args:
      label_count: [C, K], images of each class at each client.
    """
    count = jnp.asarray(label_count, jnp.float32)
    equal = jnp.sum(count, axis=1, keepdims=True) / count.shape[1]
    return (count > 0) & (count >= HELD_FROM * equal)


def generate(
    model_gan: gan.Gan, generators: ModelState, key: Array, count: int, num_clients: int
) -> Array:
    """`count` signed images from each generator, [C * count, H, W, D].

    Args:
      model_gan: whose generators these are.
      generators: of the clients, [C, ...].
      key: of the noise.
      count: images of each client.
      num_clients: C.
    """

    def one(generator: ModelState, i: Array) -> Array:
        z = jax.random.normal(prng.at(key, i), (count, model_gan.latent_dim))
        # Images, not what they are made of, are what devices exchange below.
        return sharing.spread(model_gan.sample(generator, sharing.spread(z)))

    images = parallel.expert_map(one, generators, jnp.arange(num_clients))
    # From samples to clients first: each device sends no more than its own images.
    images = sharing.spread(sharing.spread(images, axis=1))
    return sharing.spread(images.reshape(-1, *images.shape[2:]))
