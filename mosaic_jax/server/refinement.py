"""Generators that the teacher recognises: steps on the server, without data.

A client's generator can draw images that its own classifier takes for the client's
classes and the teacher for others. The server knows how many images of each class the
client has, and the teacher; it moves the generator until the two agree.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng, schema, sharing
from mosaic_jax.core.types import Array, ModelState, Teacher, Tree
from mosaic_jax.fl import gan
from mosaic_jax.nn import losses
from mosaic_jax.server import mosaic


@dataclasses.dataclass(frozen=True)
class RefineSettings(schema.Group):
    """How the server moves uploaded generators towards the teacher."""

    steps: int = schema.at_least(
        0, default=0, meaning="of Adam, for each generator; 0: none"
    )
    batch_size: int = schema.at_least(2, default=64, meaning="images in a step")
    learning_rate: float = schema.above(0, default=3e-4, meaning="of Adam")
    entropy_weight: float = schema.at_least(
        0, default=0.5, meaning="of the teacher's mean entropy"
    )
    distance_weight: float = schema.at_least(
        0, default=2.0, meaning="of the squared distance from the images before"
    )


def drawn(model_gan: gan.Gan, generator: ModelState, key: Array, count: int) -> Array:
    """Signed images [count, H, W, D] of one generator.

    Args:
      model_gan: whose generator this is.
      generator: of one client.
      key: of the noise.
      count: number of images.
    """
    z = jax.random.normal(key, (count, model_gan.latent_dim))
    return model_gan.sample(generator, sharing.spread(z))


def named(logits: Array) -> Array:
    """[K], share of each class among the answers to logits [B, K]."""
    return jnp.mean(jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1]), axis=0)


def loss(
    logits: Array,
    image: Array,
    before: Array,
    *,
    share: Array,
    config: RefineSettings,
) -> Array:
    """What is minimised: [] float32.

    `KL(share || mean p) + w_ent mean H(p) + w_dist mean (x - x0)^2` for the teacher's
    softmax p.

    Args:
      logits: [B, K] of the teacher.
      image: [B, H, W, D] signed images x of the generator.
      before: those x0 of the uploaded generator, of the same noise.
      share: [K], of the client's labels; sums to 1.
      config: with the weights.
    """
    mean = jnp.mean(jax.nn.softmax(logits), axis=0)
    apart = jnp.sum(jax.scipy.special.rel_entr(share, jnp.maximum(mean, 1e-8)))
    return (
        apart
        + config.entropy_weight * losses.entropy(logits)
        + config.distance_weight * jnp.mean((image - before) ** 2)
    )


def refine(
    config: RefineSettings,
    ensemble: mosaic.Ensemble,
    model_gan: gan.Gan,
    teacher: Teacher,
    uploaded: ModelState,
    share: Array,
    key: Array,
) -> tuple[ModelState, Array]:
    """Move one client's generator; its batch-norm statistics stay.

    Args:
      config: steps and weights.
      ensemble: the teacher's networks.
      model_gan: whose generator this is.
      teacher: that should recognise the client's classes.
      uploaded: the generator that the client sent.
      share: [K], of the client's labels; sums to 1.
      key: random key of this client.

    Returns:
      The generator after `config.steps` steps of Adam, and the last step's loss [].
    """
    tx = optax.adam(config.learning_rate)

    def objective(params: Tree, key: Array) -> Array:
        z = jax.random.normal(key, (config.batch_size, model_gan.latent_dim))
        z = sharing.spread(z)
        before = model_gan.sample(uploaded, z)
        image = model_gan.sample(uploaded.replace(params=params), z)
        logits = ensemble.logits(teacher, image)
        return loss(logits, image, before, share=share, config=config)

    def step(number: Array, carry: Tree) -> Tree:
        params, opt_state, _ = carry
        found, gradient = jax.value_and_grad(objective)(params, prng.at(key, number))
        update, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, update), opt_state, found

    start: Any = (uploaded.params, tx.init(uploaded.params), jnp.zeros(()))
    params, _, found = jax.lax.fori_loop(0, config.steps, step, start)
    return uploaded.replace(params=params), found
