"""Training of the global model on the server, without data, as DENSE and others do it.

A method is a frozen dataclass in a file of its own with `init` and `train`, all that it
needs; its fields are its hyper-parameters, set by `config.methods.NAME`. It runs once
over the clients of trained rounds, or after every aggregation, by `config.server.when`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import flops, models, parallel, trees
from mosaic_jax.classifier import Classifier
from mosaic_jax.types import Array, GeneratorState, ModelState, Teachers, Tree


@dataclasses.dataclass(frozen=True)
class Task:
    """What a method must know of the study.

    Attributes:
      classifier: of clients and server.
      image_shape: (H, W, D).
      num_classes: K.
      augmentation: of real training images.
      lowering: of the generators' convolutions.
      batch_norm: of the student in training: "eval" keeps the running statistics that
        real images left; "train" normalises by the batch and moves them, as the
        original codes do, whose networks keep none or have no batch-norm.
    """

    classifier: Classifier
    image_shape: tuple[int, int, int]
    num_classes: int
    augmentation: str
    lowering: str
    batch_norm: str

    def student_logits(self, model: ModelState, image: Array) -> tuple[Array, Tree]:
        """Logits [B, K] of the student in training, and its new statistics."""
        if self.batch_norm == "train":
            return self.classifier.train_logits(model, image)
        return self.classifier.logits(model, image), model.batch_stats


class ServerTraining:
    """What every method has.

    A client without labels in `teachers` teaches nothing, and the order of clients
    makes no difference: `tests/test_contracts.py` holds every method to that.
    """

    # Samples that a round shows the student. Only the progress bar's samples per second
    # come from it; a field of this name takes its place.
    batch_size = 1

    def init(self, task: Task, model: ModelState, key: Array) -> Tree:
        """State before the first round: generator, optimisers."""
        raise NotImplementedError

    def train(
        self,
        task: Task,
        state: Tree,
        model: ModelState,
        teachers: Teachers,
        key: Array,
        number: Array,
    ) -> tuple[Tree, ModelState, dict[str, Array]]:
        """Round `number` of server training, from the aggregated global `model`.

        Returns:
          New state and global model, and scalar metrics.
        """
        raise NotImplementedError

    def flops(self, task: Task, num_teachers: int, rounds: int) -> float:
        """Of rounds 0 to `rounds` - 1 of training with `num_teachers` clients' models.

        As `mosaic_jax.flops` counts. By default `rounds` times what XLA counts in the
        program of a round, where a loop counts one turn: override it where there is
        one.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        model = jax.eval_shape(
            functools.partial(task.classifier.init, image_shape=task.image_shape), key
        )
        number = jax.ShapeDtypeStruct((num_teachers,), jnp.int32)
        teachers = Teachers(
            jax.eval_shape(lambda one: trees.broadcast(one, num_teachers), model),
            jax.ShapeDtypeStruct((num_teachers, task.num_classes), jnp.float32),
            number,
        )
        state = jax.eval_shape(functools.partial(self.init, task), model, key)
        step = functools.partial(self.train, task)
        one = jax.ShapeDtypeStruct((), jnp.int32)
        return rounds * flops.count(step, state, model, teachers, key, one)


def generator_flops(module: models.Module, *inputs: Array) -> float:
    """Of one image; `inputs` are an example of one."""
    shape = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    run = functools.partial(module.apply, train=False)
    return flops.count(run, shape, *inputs)


def class_shares(label_count: Array) -> tuple[Array, Array]:
    """Shares of each class over clients, and of classes over all images.

    Args:
      label_count: [m, K].

    Returns:
      tau [m, K] with columns that sum to 1 (0 where nobody holds the class), p [K].
    """
    count = jnp.asarray(label_count, jnp.float32)
    held = jnp.sum(count, axis=0)
    return count / jnp.maximum(held, 1)[None], held / jnp.maximum(jnp.sum(held), 1)


def mean_over_teachers(value: Array, teachers: Teachers) -> Array:
    """Mean of `value` [m, ...] over the clients that used any labels; 0 if none did."""
    count = jnp.sum(teaches(teachers))
    there = jnp.expand_dims(teaches(teachers), range(1, value.ndim))
    # A factor of exactly 1 where all of them did.
    scale = len(value) / jnp.maximum(count, 1)
    return scale * jnp.mean(jnp.where(there, value, 0), axis=0)


def teaches(teachers: Teachers) -> Array:
    """[m] bool: the clients that used any labels."""
    return jnp.sum(teachers.label_count, axis=1) > 0


def draw_labels(key: Array, share: Array, count: int) -> Array:
    """`count` labels whose class shares equal `share` [K] as nearly as they can.

    Stratified: one uniform draw in each of `count` equal parts of [0, 1).
    """
    point = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    label = jnp.searchsorted(jnp.cumsum(share), point, side="right")
    # Rounding of the sum must not lead past the last class that there is.
    last = len(share) - 1 - jnp.argmax(share[::-1] > 0)
    return jnp.minimum(label, last)


def client_logits(task: Task, client_model: ModelState, image: Array) -> Array:
    """[m, B, K] by running statistics, of signed images [B, H, W, D]."""
    return parallel.expert_map(
        lambda model: task.classifier.logits(model, image), client_model
    )


def generator_state(
    module: models.Module, tx: optax.GradientTransformation, key: Array, *inputs: Array
) -> GeneratorState:
    """A fresh generator and its optimiser; `inputs` are an example."""
    variables = module.init(key, *inputs, train=False)
    model = ModelState(variables["params"], variables["batch_stats"])
    return GeneratorState(model, tx.init(model.params))


def generator_step(
    tx: optax.GradientTransformation,
    state: GeneratorState,
    objective: Callable[[Tree], tuple[Array, Tree]],
) -> tuple[GeneratorState, Array]:
    """One step on `objective(params) -> loss, batch_stats`; returns the loss."""
    (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
        state.model.params
    )
    update, opt_state = tx.update(gradient, state.opt_state, state.model.params)
    params = optax.apply_updates(state.model.params, update)
    return GeneratorState(ModelState(params, batch_stats), opt_state), loss


def student_step(
    task: Task,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    image: Array,
    objective: Callable[[Array], Array],
) -> tuple[ModelState, optax.OptState, Array]:
    """One step of the student on `objective(logits)`."""

    def loss_of(params: Tree) -> tuple[Array, Tree]:
        logits, batch_stats = task.student_logits(model.replace(params=params), image)
        return objective(logits), batch_stats

    (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        model.params
    )
    update, opt_state = tx.update(gradient, opt_state, model.params)
    params = optax.apply_updates(model.params, update)
    return ModelState(params, batch_stats), opt_state, loss
