"""A growing pool of synthetic batches, as DENSE and Co-Boosting have it.

A generator is trained anew for each batch; the student goes through all that there are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng, sharing, trees
from mosaic_jax.core.types import Array, GeneratorState, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.nn import conditional, dcgan
from mosaic_jax.server import base


def best_batch(
    task: base.Task,
    loss_of: Callable[[Array, Array], Array],
    key: jax.Array,
    *,
    steps: int,
    noise_shape: tuple[int, int],
    width: int,
    tx: optax.GradientTransformation,
) -> tuple[Array, Array]:
    """Train a new generator, with its noise, on one batch of noise.

    Args:
      task: properties of the study.
      loss_of: from signed images [B, H, W, D] and the number of the step to the loss
        [], to be minimised.
      key: random key of generator and noise.
      steps: of the optimiser.
      noise_shape: (B, nz).
      width: of the generator.
      tx: the optimiser of both.

    Returns:
      The batch of signed images [B, H, W, D] with the lowest loss, and that loss [].
    """
    size, channels = dcgan.side_of(task.image_shape), task.image_shape[-1]
    module = conditional.DenseGenerator(size, channels, width, task.lowering)
    z = jax.random.normal(prng.named(key, "z"), noise_shape)
    fresh = base.generator_state(module, tx, prng.named(key, "init"), z)
    variables = {"generator": fresh.model.params, "z": z}
    fresh = GeneratorState(fresh.model.replace(params=variables), tx.init(variables))

    def step(i: Array, carry: Tree) -> Tree:
        state, best = carry

        def objective(params: Tree) -> tuple[Array, Tree]:
            generator = state.model.replace(params=params["generator"])
            z = sharing.spread(params["z"])
            image, updated = module.apply(
                generator.variables, z, train=True, mutable=["batch_stats"]
            )
            return loss_of(image, i), (updated["batch_stats"], image)

        (loss, (batch_stats, image)), gradient = jax.value_and_grad(
            objective, has_aux=True
        )(state.model.params)
        update, opt_state = tx.update(gradient, state.opt_state)
        params = optax.apply_updates(state.model.params, update)
        best = trees.select(loss < best[1], (image, loss), best)
        return GeneratorState(ModelState(params, batch_stats), opt_state), best

    nothing = jnp.zeros((noise_shape[0], *task.image_shape)), jnp.array(jnp.inf)
    _, best = jax.lax.fori_loop(0, steps, step, (fresh, nothing))
    return best


def generator_flops(task: base.Task, latent_dim: int, width: int) -> float:
    """FLOPs of generating one image.

    Args:
      task: properties of the study.
      latent_dim: length of the noise.
      width: of the generator.
    """
    size, channels = dcgan.side_of(task.image_shape), task.image_shape[-1]
    module = conditional.DenseGenerator(size, channels, width, task.lowering)
    return base.generator_flops(module, jnp.zeros((1, latent_dim)))


def with_batch(images: Array, count: Array, image: Array) -> Array:
    """The pool with a further batch, in place of the oldest where it is full.

    Args:
      images: uint8 [P, B, H, W, D].
      count: [] int32, batches made so far.
      image: signed images [B, H, W, D].
    """
    slot = count % len(images)
    return jnp.asarray(images).at[slot].set(augment.to_uint8(image))


def epoch(images: Array, count: Array, key: jax.Array) -> tuple[Array, Array]:
    """An epoch of the pool in random order.

    Args:
      images: uint8 [P, B, H, W, D].
      count: [] int32, batches made so far.
      key: random key of the order.

    Returns:
      Numbers [P, B] int32 among the P B images of the pool, a row for each minibatch;
      and the number [] of those rows, the first ones, that hold images.
    """
    size, batch_size = images.shape[:2]
    num_batches = jnp.minimum(count, size)
    noise = jax.random.uniform(key, (size * batch_size,))
    there = jnp.arange(size * batch_size) < num_batches * batch_size
    order = jnp.argsort(jnp.where(there, noise, 2.0))
    return order.reshape(size, batch_size), num_batches
