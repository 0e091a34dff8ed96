"""Training of all clients on their own data, outside of federated rounds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, steps, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT, Metrics, Run, Steps, Work
from mosaic_jax.core.types import Array, Batch, Client, LabelledImages, ModelState, Tree
from mosaic_jax.fl import schedule, training
from mosaic_jax.fl.parallel import ClientAxis
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
    axis, every = context.axis, context.settings.log.every_steps
    plan = axis.plan(num_steps, every)
    state = yield Steps(
        name,
        OwnSteps(axis, step, every, batch_size, augmentation, context.mechanism),
        (context.clients, each, shared, key, axis.replicate(plan.windows())),
        state,
        plan.length,
        every=every,
        samples_per_step=batch_size * int(num_steps.sum()) // plan.length,
        # Clients of another seed have other numbers of images, and so of steps.
        together=False,
        layout=plan.layout,
        pictures=pictures,
    )
    return state


@dataclasses.dataclass(frozen=True)
class OwnSteps(Work):
    """Steps of every client, each its own number of them, by a schedule.

    A window's tally is each client's own, so that its metrics do not depend on the
    order in which clients take turns.

    Attributes:
      axis: where clients run.
      step: a step of one client.
      every: steps in a window.
      batch_size: images in a step.
      augmentation: of the images, a name of `augment.AUGMENTATIONS`.
      mechanism: of a private study, else None.
    """

    axis: ClientAxis
    step: LocalStep
    every: int
    batch_size: int
    augmentation: str
    mechanism: Mechanism | None

    @functools.cached_property
    def _step(self) -> LocalStep:
        return steps.traced_once(self.step)

    def empty(self, args: Tree, state: Tree) -> Tree:
        """See `Work`: sums of metrics [C] by name, and numbers of steps [C]."""
        data, each, shared, key, _ = args
        count = self.axis.num_clients

        def metrics(state: Tree, *further: Tree) -> Metrics:
            zero = jnp.zeros((), jnp.int32)
            return self._steps(key, zero, zero, *further)(zero, state)[1]

        one = jax.tree.map(
            lambda leaf: trees.shape(leaf.shape[1:], leaf.dtype),
            (state, data.client, each),
        )
        found = jax.eval_shape(metrics, *one, shared, data.images)
        sums = {
            name: np.zeros((count, *leaf.shape), leaf.dtype)
            for name, leaf in found.items()
        }
        return sums, np.zeros(count, np.int32)

    def run(
        self, args: Tree, state: Tree, tally: Tree, first: Array, end: Array
    ) -> tuple[Tree, Tree, Metrics]:
        """See `Work`."""
        data, each, shared, key, windows = args
        pieces = schedule.within(trees.take(windows, first // self.every), first, end)
        state, tally = self.axis.advance(
            functools.partial(self._advance, key),
            (state, tally),
            data.client,
            each,
            pieces=pieces,
            shared=(shared,),
            placed=(data.images,),
        )
        sums, count = tally
        total, done = jax.tree.map(jnp.sum, sums), jnp.sum(count)
        # A client that has stopped by itself has no part in the other metrics.
        active = total.get(ACTIVE, done)
        metrics = {
            name: metric / (done if name == ACTIVE else jnp.maximum(active, 1))
            for name, metric in total.items()
        }
        finite = jax.vmap(trees.all_finite)(state)
        worst = jnp.where(jnp.all(finite), -1, data.client.number[jnp.argmin(finite)])
        return state, tally, metrics | {DIVERGED_CLIENT: worst.astype(jnp.int32)}

    def _advance(
        self,
        key: jax.Array,
        carry: Tree,
        first: Array,
        count: Array,
        *given: Any,
    ) -> Tree:
        """State and tally of one client after its steps `first` to + `count` - 1.

        What it is `given` further is as of `_steps`.
        """
        step_at = self._steps(key, first, count, *given)

        def body(j: Array, carry: Tree) -> Tree:
            state, (sums, done) = carry
            state, metrics = step_at(j, state)
            return state, (trees.add(sums, metrics), done + 1)

        return steps.train(0, count, body, carry)

    def _steps(
        self,
        key: jax.Array,
        first: Array,
        count: Array,
        client: Client,
        each: Tree,
        shared: Tree,
        images: LabelledImages,
    ) -> Callable[[Array, Tree], tuple[Tree, Metrics]]:
        """From j and a client's state to state and metrics after step `first` + j."""
        batch_at = training.client_batches(
            client,
            images,
            first,
            self.every,
            key=key,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            count=count,
            mechanism=self.mechanism,
        )

        def step_at(j: Array, state: Tree) -> tuple[Tree, Metrics]:
            batch = batch_at(j)
            return self._step(state, first + j, batch, client, each, shared, key)

        return step_at


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
