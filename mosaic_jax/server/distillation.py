"""Mosaic's training of the global model: the ensemble teaches on generated images."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng, schema
from mosaic_jax.core.types import Array, LabelledImages, ModelState, Teacher, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import gan, parallel
from mosaic_jax.nn import losses
from mosaic_jax.server import base, mosaic

TRANSLATE_PIXELS = 2


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
    weighting: str = schema.one_of(
        ("uniform", "size"), default="uniform", meaning="of clients; size: by n_i"
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
        """Held-out images are there where they are asked for."""
        if self.source == "validation" and study.data.validation == 0:
            yield (
                "data.validation = 0.0: must be > 0 for distill.source = 'validation'"
            )


@flax.struct.dataclass
class EnsembleAndGenerators:
    """What teaches the student.

    Attributes:
      teacher: experts and head.
      generators: of the clients, [C, ...].
      weight: [C], of each client's samples; 0: its generator has collapsed.
      held_out: real images that no client holds, read where `source` is "validation".
    """

    teacher: Teacher
    generators: ModelState
    weight: Array
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
        image, weight = self._batch(task, key, teachers)
        target = self.ensemble.logits(teachers.teacher, image)
        confidence = jnp.max(jax.nn.softmax(target), axis=-1)
        weight = weight * (confidence >= self.config.min_confidence)
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

    def _batch(
        self, task: base.Task, key: Array, teachers: EnsembleAndGenerators
    ) -> tuple[Array, Array]:
        """Signed images [B, H, W, D] of all clients, and the weights [B] of each."""
        count = self.config.samples_per_generator
        weight = jnp.repeat(teachers.weight, count)
        if self.config.source == "generated":
            z_key = prng.named(key, "z")
            image = generate(
                self.model_gan, teachers.generators, z_key, count, self.num_clients
            )
        else:
            # An upper bound, not the method: real images that no client holds.
            real = teachers.held_out["validation"].image
            shape = (self.samples,)
            rows = jax.random.randint(prng.named(key, "rows"), shape, 0, len(real))
            image = augment.to_signed(real[rows])
            weight = jnp.ones_like(weight)
        augment_key = prng.named(key, "augment")
        if self.config.augment == "data":
            image = augment.augment(task.augmentation, augment_key, image)
        elif self.config.augment == "translate":
            image = augment.translate(augment_key, image, pixels=TRANSLATE_PIXELS)
        return image, weight


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
        return model_gan.sample(generator, z)

    images = parallel.expert_map(one, generators, jnp.arange(num_clients))
    return images.reshape(-1, *images.shape[2:])
