"""Steps of all clients on their own data, outside of federated rounds."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import training, trees
from mosaic_jax.loop import DIVERGED_CLIENT, Run, Steps
from mosaic_jax.stages.base import Context
from mosaic_jax.types import Array, Batch, Client, LabelledImages, ModelState, Tree

# (state, step, batch, client, arguments, shared, key) -> state, metrics
LocalStep = Callable[..., tuple[Tree, dict[str, Array]]]


def run(
    context: Context,
    name: str,
    step: LocalStep,
    state: Tree,
    num_steps: np.ndarray,
    *,
    key: Array,
    batch_size: int,
    augmentation: str,
    each: Tree = (),
    shared: Tree = (),
) -> Run:
    """Bring the state [C, ...] of every client through its own number of steps.

    Args:
      context: of the stage.
      name: of the loop.
      step: of one client, on its next minibatch.
      state: at step 0.
      num_steps: [C] int, may differ: a client that is done costs nothing more.
      key: of the loop.
      batch_size: of a step.
      augmentation: of the images.
      each: arguments of each client, [C, ...].
      shared: arguments that all clients share.
    """
    data, axis = context.clients, context.axis
    every = context.settings.log.every_steps
    plan = axis.plan(num_steps, every)

    def chunk(args, state, first, end):
        del end  # the window knows
        data, each, shared, key, windows = args
        pieces = trees.take(windows, first // every)

        work = functools.partial(
            _steps_of_client,
            step,
            key,
            length=every,
            batch_size=batch_size,
            augmentation=augmentation,
        )
        state, total = axis.advance(
            work,
            state,
            data.client,
            each,
            pieces=pieces,
            shared=(shared,),
            placed=(data.images,),
        )
        done = jnp.sum(jnp.where(pieces.client >= 0, pieces.count[..., None], 0))
        metrics = jax.tree.map(lambda metric: metric / done, total)
        finite = jax.vmap(trees.all_finite)(state)
        worst = jnp.where(jnp.all(finite), -1, data.client.number[jnp.argmin(finite)])
        return state, metrics | {DIVERGED_CLIENT: worst.astype(jnp.int32)}

    state = yield Steps(
        name,
        chunk,
        (data, each, shared, key, axis.replicate(plan.windows())),
        state,
        plan.length,
        every=every,
        samples_per_step=batch_size * int(num_steps.sum()) // plan.length,
        # Clients of another seed have other numbers of steps.
        together=False,
    )
    return state


def _steps_of_client(
    step: LocalStep,
    key: Array,
    state: Tree,
    first: Array,
    count: Array,
    client: Client,
    each: Tree,
    shared: Tree,
    images: LabelledImages,
    *,
    length: int,
    batch_size: int,
    augmentation: str,
) -> tuple[Tree, dict[str, Array]]:
    """Steps `first` to `first` + `count` - 1, at most `length`, and summed metrics."""
    batch_at = training.client_batches(
        client,
        images,
        first,
        length,
        key=key,
        batch_size=batch_size,
        augmentation=augmentation,
        count=count,
    )

    def one(j: Array, state: Tree) -> tuple[Tree, dict[str, Array]]:
        return step(state, first + j, batch_at(j), client, each, shared, key)

    def body(j: Array, carry: Tree) -> Tree:
        state, metrics = one(j, carry[0])
        return state, trees.add(carry[1], metrics)

    zero = trees.zeros(jax.eval_shape(lambda state: one(0, state)[1], state))
    return jax.lax.fori_loop(0, count, body, (state, zero))


def train(
    context: Context,
    name: str,
    models: ModelState,
    num_steps: np.ndarray,
    *,
    key: Array,
) -> Run:
    """Plain local SGD by the settings `local`, without a server."""
    local = context.settings.local
    tx = training.sgd(local.learning_rate, local.weight_decay)

    def step(
        model: ModelState,
        number: Array,
        batch: Batch,
        client: Client,
        each: Tree,
        shared: Tree,
        key: Array,
    ):
        del number, client, each, shared, key
        # Plain SGD has no state to keep.
        opt_state = tx.init(model.params)
        model, _, loss = training.sgd_step(
            context.classifier, tx, model, opt_state, batch
        )
        return model, {"loss": loss}

    return run(
        context,
        name,
        step,
        models,
        num_steps,
        key=key,
        batch_size=local.batch_size,
        augmentation=context.data.info.augmentation,
    )
