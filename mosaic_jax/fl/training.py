"""Minibatches and local training of one client."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import errors, prng, schema, trees
from mosaic_jax.core.types import Array, Batch, Client, LabelledImages, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import optimizers
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn import losses
from mosaic_jax.nn.classifier import Classifier

# (logits [B, K], features [B, F]) -> logits.
LogitsHook = Callable[[Array, Array], Array]
# (parameters, features [B, F]) -> scalar added to the loss.
PenaltyHook = Callable[[Tree, Array], Array]


@dataclasses.dataclass(frozen=True)
class Local(schema.Group):
    """Local training of a client in a federated round."""

    steps: int = schema.at_least(1, default=10, meaning="minibatches a round")
    batch_size: int = schema.at_least(1, default=64, meaning="images in a minibatch")
    learning_rate: float = schema.above(0, default=0.01, meaning="of the optimiser")
    weight_decay: float = schema.at_least(
        0, default=1e-4, meaning="L2 on every parameter, as PyTorch's SGD has it"
    )
    optimizer: str = schema.component(
        optimizers.OPTIMIZERS,
        default="sgd",
        meaning="fresh in every round; or one of optax, such as optax:lion",
    )
    momentum: float = schema.below_one(0.9, "of optimizer = momentum and nesterov")
    clip_norm: float = schema.at_least(
        0, default=0.0, meaning="largest norm of a gradient, before L2 is added; 0: any"
    )
    schedule: str = schema.one_of(
        optimizers.SCHEDULES,
        default="constant",
        meaning="of the learning rate over the rounds of the study but the last ones,"
        " finetune's, which have their own rate",
    )
    schedule_rounds: int = schema.at_least(
        1,
        default=1,
        meaning="step: rounds of one rate; cosine: rounds to the least rate",
    )
    schedule_factor: float = schema.between(
        0,
        1,
        default=0.99,
        meaning="step: from one rate to the next; cosine: from the first to the least",
    )
    epochs: int = schema.at_least(
        0, default=0, meaning="passes over its images that a client makes; 0: `steps`"
    )
    stragglers: float = schema.between(
        0, 1, default=0.0, meaning="probability that a client is slow in a round"
    )
    straggler_share: float = schema.field(
        0.1,
        "in (0, 1]",
        lambda x: 0 < x <= 1,
        "of its steps that a slow client makes at least; drawn between this and 1",
    )

    failures: float = schema.below_one(
        0.0, "probability that a client trains in a round but its upload is lost"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Prototypes go by `steps` minibatches, and by what every client sends."""
        if self.failures and study.exchanges_prototypes:
            yield (
                f"local.failures = {self.failures}: must be 0 for init.method ="
                f" {study.init.method!r}, whose clients exchange prototypes"
            )
        if self.failures and study.prototypes.gathered == "every_round":
            yield (
                f"local.failures = {self.failures}: must be 0 for prototypes.gathered ="
                " 'every_round', which are sent with the uploads"
            )
        if self.epochs and study.prototypes.gathered == "every_round":
            yield (
                f"local.epochs = {self.epochs}: must be 0 for prototypes.gathered ="
                " 'every_round'"
            )


def sgd(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with L2 regularisation of every parameter, as in PyTorch."""
    return optimizers.sgd(learning_rate, weight_decay, 0.0)


def learning_rate(local: Local, number: int | Array) -> float | jax.Array:
    """The learning rate of round `number`, counted over the study."""
    return optimizers.rate_at(
        local.schedule,
        local.learning_rate,
        number,
        rounds=local.schedule_rounds,
        factor=local.schedule_factor,
    )


def optimizer(local: Local, number: int | Array = 0) -> optax.GradientTransformation:
    """A client's optimiser in round `number`, counted over the study."""
    return optimizers.build(
        local.optimizer,
        learning_rate(local, number),
        decay=local.weight_decay,
        momentum=local.momentum,
        clip=local.clip_norm,
    )


def steps_per_epoch(size: Array, batch_size: int) -> Array:
    """Number [] of minibatches that cover `size` [] images; the last may be short."""
    return jnp.maximum(-(-size // batch_size), 1)


def epoch_order(
    key: jax.Array, epoch: int | Array, size: Array, capacity: int
) -> Array:
    """The random order of a client's images in an epoch.

    Args:
      key: random key of the client.
      epoch: [] int32, number of the epoch.
      size: [] int32, number of images of the client.
      capacity: M >= size, the padded length of its index row.

    Returns:
      Positions [M] int32 in the index row. The first `size` are those of the images,
      the same for every `capacity`; the rest is padding.
    """
    noise = jax.random.uniform(prng.at(key, epoch), (capacity,))
    return jnp.argsort(jnp.where(jnp.arange(capacity) < size, noise, 2.0))


def batch_slots(
    key: jax.Array,
    first: int | Array,
    count: int | Array,
    size: Array,
    *,
    capacity: int,
    length: int,
    batch_size: int,
) -> tuple[Array, Array]:
    """Which of its images a client uses in steps `first` to `first` + `count` - 1.

    Images are reshuffled in every epoch. Each epoch that the steps touch is sorted
    once, however many of its minibatches they read.

    Args:
      key: random key of the client.
      first: [] int32, number of the first step, counted over all epochs.
      count: [] int32, number of steps, at most `length`.
      size: [] int32, number of images of the client.
      capacity: M, the padded length of its index row.
      length: S, rows of the result.
      batch_size: B.

    Returns:
      Positions [S, B] int32 in the index row, and their mask [S, B] bool, False past
      the end of a short last batch. Rows past `count` have no meaning.
    """
    per_epoch = steps_per_epoch(size, batch_size)
    epoch, position = jnp.divmod(first + jnp.arange(length), per_epoch)
    slot = position[:, None] * batch_size + jnp.arange(batch_size)[None]
    begin, end = epoch[0], (first + count - 1) // per_epoch

    def fill(number: Array, found: Array, capacity: int) -> Array:
        order = epoch_order(key, number, size, capacity)
        new = order[jnp.minimum(slot, size - 1)]
        return jnp.where((epoch == number)[:, None], new, found)

    # Epochs between the first and the last lie within the steps, so that a client with
    # such epochs has few images. Their sorts are short, which saves time where clients
    # of all sizes run batched.
    short = min(capacity, max(length - 2, 1) * batch_size)
    found = jax.lax.fori_loop(
        begin + 1,
        end,
        functools.partial(fill, capacity=short),
        jnp.zeros((length, batch_size), jnp.int32),
    )
    found = jax.lax.fori_loop(
        0,
        jnp.where(count > 0, jnp.where(end > begin, 2, 1), 0),
        lambda i, found: fill(jnp.where(i, end, begin), found, capacity),
        found,
    )
    return found, slot < size


def client_rows(
    client: Client,
    first: int | Array,
    length: int,
    *,
    key: jax.Array,
    batch_size: int,
    count: Array | None = None,
) -> tuple[Array, Array]:
    """Image numbers of successive minibatches of one client.

    Args:
      client: whose images they are.
      first: [] int32, number of the first minibatch, counted over all epochs.
      length: S, number of minibatches.
      key: random key of all clients.
      batch_size: B.
      count: [] int32, of the minibatches only the first `count` are drawn; None: all.

    Returns:
      Numbers [S, B] int32, and their mask [S, B] bool, False past the end of a short
      last batch.
    """
    slot, mask = batch_slots(
        prng.at(prng.named(key, "shuffle"), client.number),
        first,
        length if count is None else count,
        client.size,
        capacity=client.index.shape[-1],
        length=length,
        batch_size=batch_size,
    )
    return client.index[slot], mask


def client_batches(
    client: Client,
    images: LabelledImages,
    first: int | Array,
    length: int,
    *,
    key: jax.Array,
    batch_size: int,
    augmentation: str,
    count: Array | None = None,
    mechanism: Mechanism | None = None,
) -> Callable[[Array], Batch]:
    """Successive minibatches of one client.

    The images of all of them are determined here, once: call this before the loop over
    minibatches. Those of private studies are drawn one by one.

    Args:
      client: whose images they are.
      images: of all clients.
      first: [] int32, number of the first minibatch, counted over all epochs.
      length: S, number of minibatches.
      key: random key of all clients.
      batch_size: B.
      augmentation: a name of `augment.AUGMENTATIONS`.
      count: [] int32, of the minibatches only the first `count` are drawn; None: all.
      mechanism: of a private study, whose minibatches are Poisson batches of
        `batch_size` images on average; None: they go through shuffled epochs.

    Returns:
      A function from j to minibatch number `first` + j, of augmented images in [-1, 1].
    """
    if mechanism is None:
        rows, mask = client_rows(
            client, first, length, key=key, batch_size=batch_size, count=count
        )
    augment_key = prng.named(key, "augment")

    def at(j: Array) -> tuple[Array, Array]:
        if mechanism is None:
            return rows[j], mask[j]
        draw = prng.at(prng.named(key, "poisson"), first + j, client.number)
        position, drawn = mechanism.batch(client, draw, batch_size)
        return client.index[position], drawn

    def batch_at(j: Array) -> Batch:
        row, counts = at(j)
        image = augment.to_signed(images.image[row])
        one_key = prng.at(augment_key, first + j, client.number)
        image = augment.augment(augmentation, one_key, image)
        return Batch(image=image, label=images.label[row], mask=counts)

    return batch_at


def sgd_step(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    batch: Batch,
    *,
    adjust_logits: LogitsHook = lambda logits, features: logits,
    penalty: PenaltyHook = lambda params, features: jnp.zeros(()),
) -> tuple[ModelState, optax.OptState, Array]:
    """One optimiser step on the cross-entropy of a minibatch.

    Args:
      classifier: the network.
      tx: the optimiser.
      model: variables of the network.
      opt_state: state of the optimiser.
      batch: the minibatch.
      adjust_logits: from logits [B, K] and features [B, F] to the logits of the loss.
      penalty: from parameters and features [B, F] to a scalar added to the loss.

    Returns:
      The new model and optimiser state, and the loss [] without the penalty.
    """
    return sgd_step_and_features(
        classifier,
        tx,
        model,
        opt_state,
        batch,
        adjust_logits=adjust_logits,
        penalty=penalty,
    )[:3]


def sgd_step_and_features(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    batch: Batch,
    *,
    adjust_logits: LogitsHook,
    penalty: PenaltyHook,
) -> tuple[ModelState, optax.OptState, Array, Array]:
    """As `sgd_step`, with the features [B, F] of the minibatch before the step.

    Args:
      classifier: the network.
      tx: the optimiser.
      model: variables of the network.
      opt_state: state of the optimiser.
      batch: the minibatch.
      adjust_logits: as of `sgd_step`.
      penalty: likewise.
    """
    slope, (batch_stats, loss, features) = gradient(
        classifier, model, batch, adjust_logits=adjust_logits, penalty=penalty
    )
    update, opt_state = tx.update(slope, opt_state, model.params)
    params = optax.apply_updates(model.params, update)
    return ModelState(params, batch_stats), opt_state, loss, features


def gradient(
    classifier: Classifier,
    model: ModelState,
    batch: Batch,
    *,
    adjust_logits: LogitsHook = lambda logits, features: logits,
    penalty: PenaltyHook = lambda params, features: jnp.zeros(()),
) -> tuple[Tree, tuple[Tree, Array, Array]]:
    """The gradient of the cross-entropy of a minibatch, and of the penalty.

    Args:
      classifier: the network.
      model: variables of the network.
      batch: the minibatch.
      adjust_logits: as of `sgd_step`.
      penalty: likewise.

    Returns:
      The gradient; and the new `batch_stats`, the loss [] without the penalty, and the
      features [B, F].
    """

    def objective(params: Tree) -> tuple[Array, tuple[Tree, Array, Array]]:
        logits, features, batch_stats = classifier.train_outputs(
            model.replace(params=params), batch.image, batch.mask
        )
        logits = adjust_logits(logits, features)
        loss = losses.cross_entropy(logits, batch.label, batch.mask)
        return loss + penalty(params, features), (batch_stats, loss, features)

    return jax.grad(objective, has_aux=True)(model.params)


def private_step(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    batch: Batch,
    *,
    mechanism: Mechanism,
    client: Client,
    batch_size: int,
    key: jax.Array,
    adjust_logits: Callable[[Array, Array, Batch], Array] = lambda logits, *_: logits,
    penalty: Callable[[Tree], Array] = lambda params: jnp.zeros(()),
) -> tuple[ModelState, optax.OptState]:
    """As `sgd_step`, with the noisy mean of the images' clipped gradients.

    No loss is returned, as it would tell of the images.

    Args:
      classifier: the network.
      tx: the optimiser.
      model: variables of the network.
      opt_state: state of the optimiser.
      batch: a Poisson batch.
      mechanism: of the study.
      client: whose images they are.
      batch_size: expected number of images in the batch.
      key: random key of the client and the step, used for nothing else.
      adjust_logits: from logits [1, K], features [1, F] and the minibatch of a single
        image to the logits of its loss.
      penalty: from parameters to a scalar added to the loss; it sees no image.

    Returns:
      The new model and optimiser state.

    Raises:
      ConfigError: the network keeps statistics of its images.
    """
    if jax.tree.leaves(model.batch_stats):
        raise errors.ConfigError(
            "model.norm = 'batch': must be 'group' or 'layer' for privacy.epsilon > 0,"
            " as running statistics tell of the images"
        )

    def of_image(batch: Batch) -> Tree:
        """The gradient of the loss of one image."""
        batch = jax.tree.map(lambda leaf: leaf[None], batch)

        def objective(params: Tree) -> Array:
            logits, features, _ = classifier.train_outputs(
                model.replace(params=params), batch.image
            )
            logits = adjust_logits(logits, features, batch)
            return losses.cross_entropy(logits, batch.label)

        return jax.grad(objective)(model.params)

    slope = mechanism.mean_gradient(
        of_image, batch, batch.mask, client=client, batch_size=batch_size, key=key
    )
    slope = trees.add(slope, jax.grad(penalty)(model.params))
    update, opt_state = tx.update(slope, opt_state, model.params)
    return model.replace(params=optax.apply_updates(model.params, update)), opt_state
