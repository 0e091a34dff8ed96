"""Minibatches of one client and its local training."""

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


def batch_slots(
    key: Array, step: Array, size: Array, capacity: int, batch_size: int
) -> tuple[Array, Array]:
    """Which of its images a client uses at `step`: reshuffled epochs, in order.

    Args:
      key: the client's key.
      step: [] int32, counted over all epochs.
      size: [] int32, images of the client.
      capacity: M, the padded length of its index row.
      batch_size: B.

    Returns:
      Positions [B] int32 in the index row, and their mask [B] (False: past the end
      of a short last batch).
    """
    epoch, position = jnp.divmod(step, steps_per_epoch(size, batch_size))
    noise = jax.random.uniform(prng.at(key, epoch), (capacity,))
    order = jnp.argsort(jnp.where(jnp.arange(capacity) < size, noise, 2.0))
    slot = position * batch_size + jnp.arange(batch_size)
    return order[jnp.minimum(slot, size - 1)], slot < size


def client_rows(
    client: Client, step: Array, *, key: Array, batch_size: int
) -> tuple[Array, Array]:
    """Image numbers [B] of minibatch `step` of one client, and their mask [B]."""
    shuffle_key = prng.at(prng.named(key, "shuffle"), client.number)
    slot, mask = batch_slots(
        shuffle_key, step, client.size, client.index.shape[-1], batch_size
    )
    return client.index[slot], mask


def client_batch(
    client: Client,
    images: LabelledImages,
    step: Array,
    *,
    key: Array,
    batch_size: int,
    augmentation: str,
) -> Batch:
    """Minibatch number `step` of one client, in [-1, 1], augmented."""
    rows, mask = client_rows(client, step, key=key, batch_size=batch_size)
    augment_key = prng.at(prng.named(key, "augment"), step, client.number)
    image = augment.to_signed(images.image[rows])
    image = augment.augment(augmentation, augment_key, image)
    return Batch(image=image, label=images.label[rows], mask=mask)


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
