"""How much of its work a client gets done in a round, and whether it arrives."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng
from mosaic_jax.core.types import Array, Client
from mosaic_jax.fl import training


def planned_steps(local: training.Local, size: Array) -> int | Array:
    """Number [] of minibatches a round of a client with `size` [] images."""
    if not local.epochs:
        return local.steps
    return local.epochs * training.steps_per_epoch(size, local.batch_size)


def most_steps(local: training.Local, capacity: int) -> int:
    """The most minibatches a round of a client whose index row is that long."""
    if not local.epochs:
        return local.steps
    return local.epochs * max(-(-capacity // local.batch_size), 1)


def steps_done(
    local: training.Local, client: Client, key: jax.Array, number: int | Array
) -> Array | None:
    """How many of its minibatches a client gets done in a round, [] int32.

    None: `local.steps`, as every other client.

    Args:
      local: settings of its training.
      client: the client.
      key: random key of all rounds.
      number: [] int32 of the round, over the study.
    """
    if not local.epochs and not local.stragglers:
        return None
    planned = jnp.asarray(planned_steps(local, client.size), jnp.int32)
    if not local.stragglers:
        return planned
    draw = prng.at(prng.named(key, "stragglers"), number, client.number)
    slow, share = jax.random.uniform(draw, (2,))
    share = local.straggler_share + (1 - local.straggler_share) * share
    fewer = jnp.maximum(jnp.floor(share * planned), 1).astype(jnp.int32)
    return jnp.where(slow < local.stragglers, fewer, planned)


def arrives(
    local: training.Local, client: Client, key: jax.Array, number: int | Array
) -> jax.Array:
    """Whether what a client sends in a round arrives, [] bool.

    Args:
      local: settings of its training.
      client: the client.
      key: random key of all rounds.
      number: [] int32 of the round, over the study.
    """
    draw = prng.at(prng.named(key, "failures"), number, client.number)
    return jax.random.uniform(draw) >= local.failures


def labels_used(
    local: training.Local,
    client: Client,
    label: Array,
    key: jax.Array,
    number: int | Array,
) -> Array:
    """Number of images of each class [K] in a client's minibatches of a round.

    Args:
      local: settings of its training.
      client: the client.
      label: [N] int32, of all images that its rows point to.
      key: random key of all rounds.
      number: [] int32 of the round, over the study.
    """
    done = steps_done(local, client, key, number)
    rows, mask = training.client_rows(
        client,
        number * planned_steps(local, client.size),
        most_steps(local, client.index.shape[-1]),
        key=key,
        batch_size=local.batch_size,
        count=done,
    )
    if done is not None:
        mask &= (jnp.arange(len(mask)) < done)[:, None]
    held = jax.nn.one_hot(label[rows], len(client.label_count))
    return jnp.sum(held * mask[..., None], axis=(0, 1))


def mean_steps(local: training.Local, sizes: Array) -> float:
    """Expected number of minibatches in a round of one of the clients.

    Args:
      local: settings of their training.
      sizes: [C] number of images of each.
    """
    planned = np.broadcast_to(planned_steps(local, np.asarray(sizes)), np.shape(sizes))
    counts, clients = np.unique(planned, return_counts=True)
    expected = [
        count - local.stragglers * (count - _slow_steps(count, local.straggler_share))
        for count in counts
    ]
    return float(np.average(expected, weights=clients))


def _slow_steps(planned: int, least: float) -> float:
    """Expected steps of a slow client: at least j of them by chance p_j."""
    if least == 1:
        return planned
    part = np.arange(2, planned + 1) / planned
    return 1 + np.sum(np.minimum((1 - part) / (1 - least), 1))
