"""When a client stops training its generator: by what it can see itself.

A look compares features of generated images with those of the client's own images, by
its own classifier. The generator that came nearest is the one it sends; after so many
looks without one that is nearer it trains no further.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mosaic_jax.core import programs, trees
from mosaic_jax.core.types import (
    Array,
    Client,
    LabelledImages,
    ModelState,
    Struct,
    Tree,
)
from mosaic_jax.fl import prototypes
from mosaic_jax.stages import local
from mosaic_jax.stages.base import Context

# Generated images in a look, always of the same noise.
NUM_IMAGES = 64


class Moments(Struct):
    """Mean and standard deviation of features, [..., F] each."""

    mean: Array
    deviation: Array


class Best(Struct):
    """What a client has seen so far.

    Attributes:
      model: the generator that came nearest.
      distance: [] float32, how near; the largest number before the first look.
      idle: [] int32, looks since then.
      steps: [] int32, of training so far.
    """

    model: ModelState
    distance: Array
    idle: Array
    steps: Array


def start(model: ModelState) -> Best:
    """Before the first look at the generator `model`."""
    # Finite, since training stops at a state that is not.
    farthest = jnp.float32(jnp.finfo(jnp.float32).max)
    return Best(model, farthest, jnp.int32(0), jnp.int32(0))


def moments(features: Array, mask: Array | None = None) -> Moments:
    """Moments of features [n, F]; of those that the mask [n] names, if there is one."""
    counted = jnp.ones(len(features)) if mask is None else mask
    weight = counted / jnp.sum(counted)
    mean = weight @ features
    return Moments(mean, jnp.sqrt(weight @ (features - mean[None]) ** 2))


def distance(first: Moments, second: Moments) -> Array:
    """Squared Fréchet distance [] of two normal distributions of independent features.

    Reference: Dowson and Landau, 1982; Heusel et al., 2017, have the whole covariance.
    """
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jnp.asarray(sum(jnp.sum((a - b) ** 2) for a, b in pairs))


def of_own_images(context: Context, classifiers: ModelState) -> Moments:
    """Moments [C, F] of the clients' own images by their own classifiers [C, ...]."""

    def of_client(
        client: Client, classifier: ModelState, images: LabelledImages
    ) -> Moments:
        features = prototypes.features(
            context.classifier,
            classifier,
            client,
            images,
            batch_size=context.settings.evaluation.batch_size,
        )
        return moments(features, jnp.arange(len(features)) < client.size)

    data = context.clients
    program = programs.jit(
        lambda client, classifiers, images: context.axis.map(
            of_client, client, classifiers, placed=(images,)
        )
    )
    return program(data.client, classifiers, data.images)


def look(best: Best, model: ModelState, found: Array) -> Best:
    """What the client has seen after one more look.

    Args:
      best: before it.
      model: the generator that is looked at.
      found: [] its distance.
    """
    nearer = found < best.distance
    return best.replace(
        model=trees.select(nearer, model, best.model),
        distance=jnp.minimum(found, best.distance),
        idle=jnp.where(nearer, 0, best.idle + 1),
    )


def step(
    train: Callable[[Tree], tuple[Tree, dict[str, Array]]],
    look: Callable[[Tree, Best], Best],
    state: Tree,
    best: Best,
    due: Array,
    patience: int,
) -> tuple[Tree, Best, dict[str, Array]]:
    """A step of training, unless the client has stopped, and the look that is due.

    Args:
      train: the new state and metrics.
      look: at a new state.
      state: of training.
      best: of the same client, before the step.
      due: [] bool, whether there is a look after this step.
      patience: looks without a nearer generator after which a client stops.

    Returns:
      The new state, what the client has seen, and the metrics, with `local.ACTIVE`; all
      of them 0 where it has stopped.
    """
    _, shapes = jax.eval_shape(train, state)
    going = best.idle < patience
    trained, metrics = jax.lax.cond(
        trees.any_entry(going), train, lambda old: (old, trees.zeros(shapes)), state
    )
    counted = best.replace(steps=best.steps + 1)
    seen = jax.lax.cond(
        trees.any_entry(going & due), look, lambda _, old: old, trained, counted
    )
    seen = trees.select(due, seen, counted)
    metrics = trees.select(going, metrics, trees.zeros(shapes))
    return (
        trees.select(going, trained, state),
        trees.select(going, seen, best),
        metrics | {local.ACTIVE: going.astype(jnp.float32)},
    )
