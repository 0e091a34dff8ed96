"""Minibatches and local training of one client."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng, schema
from mosaic_jax.core.types import Array, Batch, Client, LabelledImages, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.nn import losses
from mosaic_jax.nn.classifier import Classifier

# (logits [B, K], features [B, F]) -> logits.
LogitsHook = Callable[[Array, Array], Array]
# (parameters, features [B, F]) -> scalar added to the loss.
PenaltyHook = Callable[[Tree, Array], Array]


@dataclasses.dataclass(frozen=True)
class Local(schema.Group):
    """Local SGD of a client in a federated round."""

    steps: int = schema.at_least(1, default=10, meaning="minibatches a round")
    batch_size: int = schema.at_least(1, default=64, meaning="images in a minibatch")
    learning_rate: float = schema.above(0, default=0.01, meaning="of plain SGD")
    weight_decay: float = schema.at_least(
        0, default=1e-4, meaning="L2 on every parameter, as PyTorch's SGD has it"
    )


def sgd(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with L2 regularisation of every parameter, as in PyTorch."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
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
) -> Callable[[Array], Batch]:
    """Successive minibatches of one client.

    The images of all of them are determined here, once: call this before the loop over
    minibatches.

    Args:
      client: whose images they are.
      images: of all clients.
      first: [] int32, number of the first minibatch, counted over all epochs.
      length: S, number of minibatches.
      key: random key of all clients.
      batch_size: B.
      augmentation: a name of `augment.AUGMENTATIONS`.
      count: [] int32, of the minibatches only the first `count` are drawn; None: all.

    Returns:
      A function from j to minibatch number `first` + j, of augmented images in [-1, 1].
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

    def objective(params: Tree) -> tuple[Array, tuple[Tree, Array]]:
        logits, features, batch_stats = classifier.train_outputs(
            model.replace(params=params), batch.image, batch.mask
        )
        logits = adjust_logits(logits, features)
        loss = losses.cross_entropy(logits, batch.label, batch.mask)
        return loss + penalty(params, features), (batch_stats, loss)

    gradient, (batch_stats, loss) = jax.grad(objective, has_aux=True)(model.params)
    update, opt_state = tx.update(gradient, opt_state, model.params)
    params = optax.apply_updates(model.params, update)
    return ModelState(params, batch_stats), opt_state, loss
