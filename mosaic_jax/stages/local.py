"""Training of all clients on their own data, outside of federated rounds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, steps, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT, Run, Steps
from mosaic_jax.core.types import Array, Batch, Client, LabelledImages, ModelState, Tree
from mosaic_jax.fl import training
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.stages.base import Context

# A step's metric of this name, 1 or 0, says whether its client still trains: those that
# do not have no part in the other metrics.
ACTIVE = "still_training"
# step(state, number, batch, client, arguments, shared, key) -> state, metrics
LocalStep = Callable[..., tuple[Tree, dict[str, Array]]]


def run_steps(
    context: Context,
    name: str,
    step: LocalStep,
    state: Tree,
    num_steps: np.ndarray,
    *,
    key: jax.Array,
    batch_size: int,
    augmentation: str,
    each: Tree = (),
    shared: Tree = (),
    pictures: Callable[[Tree], dict[str, Any]] | None = None,
) -> Run:
    """Run a loop of local steps, each client's own number of them.

    Args:
      context: of the stage.
      name: of the loop.
      step: a step of one client on its next minibatch.
      state: of the clients before step 0, leaves [C, ...].
      num_steps: [C] int, steps of each client; a client that is done costs nothing.
      key: random key of the loop.
      batch_size: images in a step.
      augmentation: of the images, a name of `augment.AUGMENTATIONS`.
      each: further arguments of `step`, leaves [C, ...]; a client gets its entry.
      shared: further arguments of `step`, the same for all clients.
      pictures: of a state, see `Steps`.

    Returns:
      The state of the clients after their last steps, leaves [C, ...].
    """
    data, axis = context.clients, context.axis
    every = context.settings.log.every_steps
    plan = axis.plan(num_steps, every)

    def chunk(args, state, first, end):
        del end  # a window has the number of its steps
        data, each, shared, key, windows = args
        pieces = trees.take(windows, first // every)

        client_steps = functools.partial(
            _steps_of_client,
            step,
            key,
            length=every,
            batch_size=batch_size,
            augmentation=augmentation,
            mechanism=context.mechanism,
        )
        state, total = axis.advance(
            client_steps,
            state,
            data.client,
            each,
            pieces=pieces,
            shared=(shared,),
            placed=(data.images,),
        )
        done = jnp.sum(jnp.where(pieces.client >= 0, pieces.count[..., None], 0))
        # A client that has stopped by itself has no part in the other metrics.
        active = total.get(ACTIVE, done)
        metrics = {
            name: metric / (done if name == ACTIVE else jnp.maximum(active, 1))
            for name, metric in total.items()
        }
        finite = jax.vmap(trees.all_finite)(state)
        worst = jnp.where(jnp.all(finite), -1, data.client.number[jnp.argmin(finite)])
        return state, metrics | {DIVERGED_CLIENT: worst.astype(jnp.int32)}

    windows = plan.windows()
    state = yield Steps(
        name,
        chunk,
        (data, each, shared, key, axis.replicate(windows)),
        state,
        plan.length,
        every=every,
        samples_per_step=batch_size * int(num_steps.sum()) // plan.length,
        # Clients of another seed have other numbers of images, and so of steps.
        together=False,
        layout=trees.digest(windows),
        pictures=pictures,
    )
    return state


def _steps_of_client(
    step: LocalStep,
    key: jax.Array,
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
    mechanism: Mechanism | None,
) -> tuple[Tree, dict[str, Array]]:
    """Steps `first` to `first` + `count` - 1 of one client; sums of their metrics."""
    batch_at = training.client_batches(
        client,
        images,
        first,
        length,
        key=key,
        batch_size=batch_size,
        augmentation=augmentation,
        count=count,
        mechanism=mechanism,
    )

    def step_at(j: Array, state: Tree) -> tuple[Tree, dict[str, Array]]:
        return step(state, first + j, batch_at(j), client, each, shared, key)

    def body(j: Array, carry: Tree) -> Tree:
        state, metrics = step_at(j, carry[0])
        return state, trees.add(carry[1], metrics)

    zero = trees.zeros(
        jax.eval_shape(lambda state: step_at(jnp.int32(0), state)[1], state)
    )
    return steps.train(0, count, body, (state, zero))


def train(
    context: Context,
    name: str,
    models: ModelState,
    num_steps: np.ndarray,
    *,
    key: jax.Array,
) -> Run:
    """Train the clients' models with the settings `local`, without a server.

    The learning rate is that of the first round.

    Args:
      context: of the stage.
      name: of the loop.
      models: of the clients before step 0, leaves [C, ...].
      num_steps: [C] int, steps of each client.
      key: random key of the loop.

    Returns:
      The trained models, leaves [C, ...].
    """
    local = context.settings.local
    tx = training.optimizer(local)

    def step(
        state: tuple[ModelState, Tree],
        number: Array,
        batch: Batch,
        client: Client,
        each: Tree,
        shared: Tree,
        key: jax.Array,
    ) -> tuple[tuple[ModelState, Tree], dict[str, Array]]:
        del each, shared
        model, opt_state = state
        if context.mechanism is not None:
            at = prng.at(prng.named(key, "privacy"), number, client.number)
            state = training.private_step(
                context.classifier,
                tx,
                model,
                opt_state,
                batch,
                mechanism=context.mechanism,
                client=client,
                batch_size=local.batch_size,
                key=at,
            )
            return state, {}
        model, opt_state, loss = training.sgd_step(
            context.classifier, tx, model, opt_state, batch
        )
        return (model, opt_state), {"loss": loss}

    init = jax.vmap(tx.init)
    opt_states = jax.eval_shape(init, models.params)
    if jax.tree.leaves(opt_states):  # plain SGD has none
        opt_states = programs.jit(init)(models.params)
    models, _ = yield from run_steps(
        context,
        name,
        step,
        (models, opt_states),
        num_steps,
        key=key,
        batch_size=local.batch_size,
        augmentation=context.data.info.augmentation,
    )
    return models
