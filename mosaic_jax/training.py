"""Minibatches of one client and its local training."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import losses, prng
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import augment
from mosaic_jax.types import Array, Batch, Client, LabelledImages, ModelState, Tree

# (logits [B, K]) -> logits, and (params) -> scalar added to the loss.
LogitsHook = Callable[[Array], Array]
PenaltyHook = Callable[[dict], Array]
# (running statistics before a step, after it, number of the step) -> statistics.
StatisticsHook = Callable[[Tree, Tree, Array], Tree]


def sgd(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with L2 in the gradient of every parameter, as PyTorch has it."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
    )


def steps_per_epoch(size: Array, batch_size: int) -> Array:
    """Minibatches that cover `size` images once; the last may be short."""
    return jnp.maximum(-(-size // batch_size), 1)


def epoch_order(key: Array, epoch: Array, size: Array, capacity: int) -> Array:
    """The order [capacity] of a client's images in an epoch; the first `size` count.

    Those are the same for every `capacity` that holds them.
    """
    noise = jax.random.uniform(prng.at(key, epoch), (capacity,))
    return jnp.argsort(jnp.where(jnp.arange(capacity) < size, noise, 2.0))


def batch_slots(
    key: Array,
    first: Array,
    count: Array,
    size: Array,
    *,
    capacity: int,
    length: int,
    batch_size: int,
) -> tuple[Array, Array]:
    """Which of its images a client uses in steps `first` to `first` + `count` - 1.

    Reshuffled epochs, in order. Each epoch that the steps touch is sorted once, however
    many of its minibatches they read.

    Args:
      key: the client's key.
      first: [] int32, counted over all epochs.
      count: [] int32, at most `length`.
      size: [] int32, images of the client.
      capacity: M, the padded length of its index row.
      length: S, steps at most.
      batch_size: B.

    Returns:
      Positions [S, B] int32 in the index row, and their mask [S, B] (False: past the
      end of a short last batch). Rows past `count` mean nothing.
    """
    per_epoch = steps_per_epoch(size, batch_size)
    epoch, position = jnp.divmod(first + jnp.arange(length), per_epoch)
    slot = position[:, None] * batch_size + jnp.arange(batch_size)[None]
    begin, end = epoch[0], (first + count - 1) // per_epoch

    def fill(number: Array, found: Array, capacity: int) -> Array:
        order = epoch_order(key, number, size, capacity)
        new = order[jnp.minimum(slot, size - 1)]
        return jnp.where((epoch == number)[:, None], new, found)

    # Epochs in between lie within the steps, so their clients have few images: sorts
    # are short, which counts where clients of all sizes run batched.
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
    first: Array,
    length: int,
    *,
    key: Array,
    batch_size: int,
    count: Array | None = None,
) -> tuple[Array, Array]:
    """Image numbers of `length` minibatches of one client from number `first` on.

    Only the first `count` of them are drawn; None: all.

    Returns:
      Numbers [S, B], and their mask [S, B].
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
    first: Array,
    length: int,
    *,
    key: Array,
    batch_size: int,
    augmentation: str,
    count: Array | None = None,
) -> Callable[[Array], Batch]:
    """`batch_at(j)`: minibatch number `first` + j of one client, in [-1, 1], augmented.

    For j below `count` (None: below `length`). Which images they hold is worked out
    here, once: call this outside of the loop over j.
    """
    rows, mask = client_rows(
        client, first, length, key=key, batch_size=batch_size, count=count
    )
    augment_key = prng.named(key, "augment")

    def batch_at(j: Array) -> Batch:
        image = augment.to_signed(images.image[rows[j]])
        one_key = prng.at(augment_key, first + j, client.number)
        image = augment.augment(augmentation, one_key, image)
        return Batch(image=image, label=images.label[rows[j]], mask=mask[j])

    return batch_at


def sgd_step(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    model: ModelState,
    opt_state: optax.OptState,
    batch: Batch,
    *,
    adjust_logits: LogitsHook = lambda logits: logits,
    penalty: PenaltyHook = lambda params: jnp.zeros(()),
) -> tuple[ModelState, optax.OptState, Array]:
    """One optimiser step on cross-entropy; returns the loss without the penalty."""

    def objective(params):
        logits, batch_stats = classifier.train_logits(
            model.replace(params=params), batch.image, batch.mask
        )
        loss = losses.cross_entropy(adjust_logits(logits), batch.label, batch.mask)
        return loss + penalty(params), (batch_stats, loss)

    gradient, (batch_stats, loss) = jax.grad(objective, has_aux=True)(model.params)
    update, opt_state = tx.update(gradient, opt_state, model.params)
    params = optax.apply_updates(model.params, update)
    return ModelState(params, batch_stats), opt_state, loss


def local_training(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    model: ModelState,
    batch_at: Callable[[Array], Batch],
    num_steps: int | Array,
    statistics: StatisticsHook = lambda old, new, step: new,
    **hooks: LogitsHook | PenaltyHook,
) -> tuple[ModelState, Array]:
    """`num_steps` steps of one client from a fresh optimiser, and the mean loss.

    Args:
      batch_at: the batch of local step 0, 1, ...
      statistics: what becomes of the running statistics after each step.
      hooks: `adjust_logits` and `penalty` of `sgd_step`.
    """

    def body(step, carry):
        old, opt_state, total = carry
        model, opt_state, loss = sgd_step(
            classifier, tx, old, opt_state, batch_at(step), **hooks
        )
        kept = statistics(old.batch_stats, model.batch_stats, step)
        return model.replace(batch_stats=kept), opt_state, total + loss

    start = (model, tx.init(model.params), jnp.zeros(()))
    model, _, total = jax.lax.fori_loop(0, num_steps, body, start)
    return model, total / jnp.maximum(num_steps, 1)
