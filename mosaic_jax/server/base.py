"""Training of the global model on the server, without data, as DENSE and others do it.

A method is a frozen dataclass in a file of its own with `init` and `train`, all that it
needs; its fields are its hyper-parameters, set by `config.methods.NAME`. It runs once
over the clients of trained rounds, or after every aggregation, by `config.server.when`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, schema, trees
from mosaic_jax.core.types import Array, GeneratorState, ModelState, Teachers, Tree
from mosaic_jax.fl import parallel
from mosaic_jax.fl.gan import Gan
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.nn import networks
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Task:
    """The properties of a study that a method may depend on.

    Attributes:
      classifier: of clients and server.
      image_shape: (H, W, D).
      num_classes: K.
      augmentation: of training images, a name of `augment.AUGMENTATIONS`.
      lowering: of the generators' convolutions, one of `conv.LOWERINGS`.
      batch_norm: of the student in training: "eval" keeps the running statistics that
        real images left; "train" normalises by the batch and moves them, as the
        original codes do, whose networks keep none or have no batch-norm.
      num_clients: C, of the study; clients have the numbers 0 to C - 1.
      rounds: how often the method trains; 0 where it does so after every aggregation.
      gan: whose generators the clients sent, for methods that ask for them.
    """

    classifier: Classifier
    image_shape: tuple[int, int, int]
    num_classes: int
    augmentation: str
    lowering: str
    batch_norm: str
    num_clients: int
    rounds: int = 0
    gan: Gan | None = None

    def student_logits(
        self, model: ModelState, image: Array, mask: Array | None = None
    ) -> tuple[Array, Tree]:
        """Logits of the student in training, and its new running statistics.

        Args:
          model: the student.
          image: signed images [B, H, W, D].
          mask: [B] bool, images that count in batch statistics; None: all.

        Returns:
          Logits [B, K] and the new `batch_stats`.
        """
        if self.batch_norm == "train":
            return self.classifier.train_logits(model, image, mask)
        return self.classifier.logits(model, image), model.batch_stats


class ServerTraining(schema.Group):
    """Base of all methods.

    Clients without labels in `teachers` must not count, and the order of clients must
    not matter; the tests check both of every method.
    """

    # Samples that the student sees in a round, only for the rate in the progress bar; a
    # field of this name takes its place.
    batch_size = 1
    # When it runs in comparisons, as in its paper: "every_round", or "once" after them.
    when: ClassVar[str] = "every_round"
    # The clients train GANs, as for Mosaic, and send their generators; the method runs
    # once, after that.
    asks_for_generators: ClassVar[bool] = False

    # In every round clients get what `lesson` returns, and add `penalty` to their loss.
    teaches_clients: ClassVar[bool] = False

    def problems(self, study: Any) -> Iterator[str]:
        """Generators are sent once, lessons in every round."""
        method = f"server.method = {study.server.method!r}"
        if self.teaches_clients and study.server.when == "once":
            yield (
                f"server.when = 'once': must be every_round for {method}, which"
                " teaches the clients"
            )
        if self.asks_for_generators and study.server.when != "once":
            yield (
                f"server.when = {study.server.when!r}: must be once for {method}, as"
                " clients send generators once"
            )

    @abc.abstractmethod
    def init(self, task: Task, model: ModelState, key: jax.Array) -> Tree:
        """State before the first round, such as a generator and optimisers.

        Args:
          task: properties of the study.
          model: the global model.
          key: random key of this state.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def train(
        self,
        task: Task,
        state: Tree,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[Tree, ModelState, dict[str, Array]]:
        """One round of training on the server.

        Args:
          task: properties of the study.
          state: of the round before, or of `init`.
          model: the aggregated global model.
          teachers: the clients' models and label counts.
          key: random key of this round.
          number: [] int32, number of the round, from 0.

        Returns:
          The new state, the new global model, and scalar metrics by name.
        """
        raise NotImplementedError

    def lesson(self, state: Tree) -> Tree:
        """What is sent to the clients with the model, of the state of the round before.

        Only of methods that teach clients.
        """
        raise NotImplementedError

    def penalty(self, task: Task, params: Tree, seen: Seen) -> Array:
        """[] float32 that a client adds to its loss; only of methods that teach them.

        Args:
          task: properties of the study.
          params: of the client's model.
          seen: what a loss may look at; `seen.turn.lesson` is what was sent.
        """
        raise NotImplementedError

    def flops(self, task: Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, counted as in `core.flops`.

        By default those of one round are counted. A loop that ends by a condition
        counts as one iteration, so a method with such loops should override this.

        Args:
          task: properties of the study.
          num_teachers: m, clients whose models teach in a round.
          rounds: number of rounds.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        model = jax.eval_shape(
            functools.partial(task.classifier.init, image_shape=task.image_shape), key
        )

        def example(model: ModelState) -> Teachers:
            return Teachers(
                client_model=trees.broadcast(model, num_teachers),
                label_count=jnp.zeros((num_teachers, task.num_classes)),
                number=jnp.arange(num_teachers),
            )

        teachers = jax.eval_shape(example, model)
        state = jax.eval_shape(functools.partial(self.init, task), model, key)
        step = functools.partial(self.train, task)
        one = jax.ShapeDtypeStruct((), jnp.int32)
        return rounds * flops.count(step, state, model, teachers, key, one)


def generator_flops(module: networks.Module, *inputs: Array) -> float:
    """FLOPs of generating one image; `inputs` are an example for one image."""
    shape = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, train=False))
    run = functools.partial(module.apply, train=False)
    return flops.count(run, shape, *inputs)


def class_shares(label_count: Array) -> tuple[Array, Array]:
    """How each class is distributed over clients, and the images over classes.

    Args:
      label_count: [m, K] int, images of each class at each client.

    Returns:
      tau [m, K], whose columns sum to 1, or to 0 for a class that no client has; and
      p [K], which sums to 1.
    """
    count = jnp.asarray(label_count, jnp.float32)
    held = jnp.sum(count, axis=0)
    return count / jnp.maximum(held, 1)[None], held / jnp.maximum(jnp.sum(held), 1)


def mean_over_teachers(value: Array, teachers: Teachers) -> Array:
    """Mean of `value` [m, ...] over the clients that have labels; 0 if none has any."""
    count = jnp.sum(teaches(teachers))
    there = jnp.expand_dims(teaches(teachers), range(1, value.ndim))
    # Exactly 1 if all of them have labels.
    scale = len(value) / jnp.maximum(count, 1)
    return scale * jnp.mean(jnp.where(there, value, 0), axis=0)


def teaches(teachers: Teachers) -> Array:
    """Which clients have labels, [m] bool."""
    return jnp.sum(teachers.label_count, axis=1) > 0


def draw_labels(key: Array, share: Array, count: int) -> Array:
    """Draw labels by stratified sampling, with one draw in each part of [0, 1).

    Args:
      key: random key.
      share: [K] float32, frequencies of the classes, sums to 1.
      count: B, number of labels.

    Returns:
      [B] int32, ascending, with frequencies as near to `share` as possible.
    """
    point = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    label = jnp.searchsorted(jnp.cumsum(share), point, side="right")
    # The sum may round to less than 1, which must not lead past the last class.
    last = len(share) - 1 - jnp.argmax(share[::-1] > 0)
    return jnp.minimum(label, last)


def client_logits(task: Task, client_model: ModelState, image: Array) -> Array:
    """Logits of the clients' models, by running statistics.

    Args:
      task: with the classifier.
      client_model: leaves [m, ...].
      image: signed images [B, H, W, D].

    Returns:
      [m, B, K].
    """
    return parallel.expert_map(
        lambda model: task.classifier.logits(model, image), client_model
    )


def generator_state(
    module: networks.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *inputs: Array,
) -> GeneratorState:
    """Initial state of a generator and its optimiser.

    Args:
      module: the generator.
      tx: the optimiser.
      key: random key.
      inputs: an example of the generator's inputs.
    """
    variables = module.init(key, *inputs, train=False)
    model = ModelState(variables["params"], variables["batch_stats"])
    return GeneratorState(model, tx.init(model.params))


def generator_step(
    tx: optax.GradientTransformation,
    state: GeneratorState,
    objective: Callable[[Tree], tuple[Array, Tree]],
) -> tuple[GeneratorState, Array]:
    """One optimiser step of a generator.

    Args:
      tx: the optimiser.
      state: of the generator.
      objective: `objective(params) -> (loss, batch_stats)`, to be minimised.

    Returns:
      The new state and the loss [].
    """
    (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
        state.model.params
    )
    update, opt_state = tx.update(gradient, state.opt_state, state.model.params)
    params = optax.apply_updates(state.model.params, update)
    return GeneratorState(ModelState(params, batch_stats), opt_state), loss


def annealed(rate: float, steps: int) -> optax.Schedule:
    """`rate`, falling to 0 by half a cosine in `steps` steps; constant for 0 steps."""
    if not steps:
        return optax.constant_schedule(rate)
    return optax.cosine_decay_schedule(rate, steps)


def student_step(
    task: Task,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    image: Array,
    objective: Callable[[Array], Array],
    mask: Array | None = None,
) -> tuple[ModelState, optax.OptState, Array]:
    """One optimiser step of the student.

    Args:
      task: with the classifier.
      tx: the optimiser.
      model: the student.
      opt_state: state of the optimiser.
      image: signed images [B, H, W, D].
      objective: of the student's logits [B, K], to be minimised.
      mask: [B] bool, images that count in batch statistics; None: all.

    Returns:
      The new model and optimiser state, and the loss [].
    """

    def loss_of(params: Tree) -> tuple[Array, Tree]:
        student = model.replace(params=params)
        logits, batch_stats = task.student_logits(student, image, mask)
        return objective(logits), batch_stats

    (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
        model.params
    )
    update, opt_state = tx.update(gradient, opt_state, model.params)
    params = optax.apply_updates(model.params, update)
    return ModelState(params, batch_stats), opt_state, loss
