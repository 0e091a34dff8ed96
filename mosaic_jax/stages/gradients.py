"""Gradient inversion of what single clients would send after one local step."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.core import prng, programs, trees
from mosaic_jax.core.steps import Metrics, Repeated, Run, Steps
from mosaic_jax.core.types import Array, Batch, Client, LabelledImages, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import inversion, parallel, training
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.candidates import Candidates

if TYPE_CHECKING:
    from mosaic_jax.stages.leakage import Leakage

# Clients that are attacked, the first ones that can be.
MOST_CLIENTS = 8


@dataclasses.dataclass(frozen=True)
class Inverted:
    """What was found by the gradient of some images of one client.

    Attributes:
      client: its number.
      psnr: of the images found, in dB; higher: more alike.
      by_chance: of as many images of the same classes that nobody holds.
      image: uint8 [B, H, W, D], those of the client.
      found: uint8 [B, H, W, D], in their order.
    """

    client: int
    psnr: float
    by_chance: float
    image: np.ndarray
    found: np.ndarray


def invert(
    config: "Leakage",
    context: Context,
    images: LabelledImages,
    clients: Sequence[Candidates],
    model: ModelState,
    suffix: str,
) -> Run:
    """Attack one local step from the global model, of one batch of each client.

    Args:
      config: of the stage.
      context: for the clients of one network.
      images: of `candidates.every_image`.
      clients: what is asked of each.
      model: the global one.
      suffix: of the network's names.

    Returns:
      `Inverted` of each client that has so many images with others to compare with.
    """
    count = config.inversion_images
    chosen = [pair for one in clients if (pair := _rows(one, count))][:MOST_CLIENTS]
    if not chosen:
        return []
    own = np.stack([rows for _, rows, _ in chosen])
    image = augment.to_signed(jnp.asarray(np.asarray(images.image)[own]))
    label = jnp.asarray(np.asarray(images.label)[own], jnp.int32)
    clients_of_network = context.data.clients.client
    numbers = np.asarray(clients_of_network.number).tolist()
    places = np.array([numbers.index(one) for one, _, _ in chosen])
    client = trees.take(clients_of_network, places)
    rate = optax.cosine_decay_schedule(config.inversion_rate, config.inversion_steps)
    classifier, tx = context.classifier, optax.adam(rate)

    def step(args: Tree, state: Tree, number: Array) -> tuple[Tree, Metrics]:
        del number
        model, label, sent = args

        def one(entry: Tree) -> Tree:
            guess, opt_state, label, sent = entry
            loss, slope = jax.value_and_grad(inversion.objective, argnums=2)(
                classifier, model, guess, label, sent, config.inversion_smooth
            )
            # Of gradients of any length only the signs count.
            update, opt_state = tx.update(jnp.sign(slope), opt_state)
            return jnp.clip(guess + update, -1, 1), opt_state, loss

        *state, loss = parallel.expert_map(
            lambda *entry: one(entry), *state, label, sent
        )
        return tuple(state), {"distance": jnp.mean(loss)}

    sent = programs.jit(functools.partial(_gradients, context))(
        model, client, image, label, prng.named(context.key, "privacy")
    )
    guess = jax.random.uniform(
        prng.named(context.key, f"guess{suffix}"), image.shape, minval=-1, maxval=1
    )
    found, _ = yield Steps(
        f"inversion{suffix}",
        Repeated(step),
        (model, label, sent),
        (guess, jax.vmap(tx.init)(guess)),
        config.inversion_steps,
        every=context.settings.log.every_steps,
        samples_per_step=len(chosen) * count,
        # Another seed may attack another number of clients.
        together=False,
    )
    result = []
    for i, (number, _, other) in enumerate(chosen):
        value, order = inversion.psnr(np.asarray(found[i]), np.asarray(image[i]))
        nobodys = augment.to_signed(np.asarray(images.image)[other])
        by_chance, _ = inversion.psnr(np.asarray(nobodys), np.asarray(image[i]))
        shown = np.asarray(augment.to_uint8(found[i]))[order]
        truth = np.asarray(images.image)[own[i]]
        result.append(Inverted(number, value, by_chance, truth, shown))
    return result


def _rows(asked: Candidates, count: int) -> tuple[int, np.ndarray, np.ndarray] | None:
    """The client, its first images, and as many of others with the same labels."""
    inside = np.flatnonzero(asked.inside & ~asked.canary)
    outside = np.flatnonzero(~asked.inside & ~asked.canary)
    if len(inside) < count:
        return None
    # Members and others have the same classes in the same order.
    chosen = np.linspace(0, len(inside) - 1, count).astype(int)
    return asked.client, asked.row[inside[chosen]], asked.row[outside[chosen]]


def _gradients(
    context: Context,
    model: ModelState,
    clients: Client,
    image: Array,
    label: Array,
    key: jax.Array,
) -> Tree:
    """What clients send after a step of plain SGD with rate 1, from the model to that.

    Args:
      context: of the stage.
      model: the global one.
      clients: that take the step, leaves [C, ...].
      image: of their batches, [C, B, H, W, D].
      label: likewise, [C, B].
      key: of the noise of private studies.
    """
    tx, mechanism = optax.sgd(1.0), context.mechanism

    def one(client: Client, image: Array, label: Array) -> Tree:
        batch = Batch(image, label, jnp.ones(len(label), bool))
        state = context.classifier, tx, model, tx.init(model.params), batch
        if mechanism is None:
            new, *_ = training.sgd_step(*state)
        else:
            new, _ = training.private_step(
                *state,
                mechanism=mechanism,
                client=client,
                batch_size=len(label),
                key=prng.at(key, client.number),
            )
        return jax.tree.map(jnp.subtract, model.params, new.params)

    return parallel.expert_map(one, clients, image, label)
