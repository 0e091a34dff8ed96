"""Optimisers of local training by name, as PyTorch has them, and rates over rounds."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.core.types import Array

Rate = float | jax.Array
# Those whose steps are sums of gradients.
LINEAR = ("sgd", "momentum", "nesterov")
SCHEDULES = ("constant", "step", "cosine")


def sgd(rate: Rate, decay: float, momentum: float) -> optax.GradientTransformation:
    """Plain SGD, L2 in the gradient.

    Args:
      rate: of learning.
      decay: of every parameter.
      momentum: of other optimisers.
    """
    del momentum
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


def heavy_ball(
    rate: Rate, decay: float, momentum: float
) -> optax.GradientTransformation:
    """SGD along `v <- momentum v + g`, L2 in the gradient, no dampening.

    Args:
      rate: of learning.
      decay: of every parameter.
      momentum: share of the last step in the next one.
    """
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))


def nesterov(rate: Rate, decay: float, momentum: float) -> optax.GradientTransformation:
    """SGD along `g + momentum v` with `v <- momentum v + g`, L2 in the gradient.

    Args:
      rate: of learning.
      decay: of every parameter.
      momentum: share of the last step in the next one.
    """
    inner = optax.sgd(rate, momentum, nesterov=True)
    return optax.chain(optax.add_decayed_weights(decay), inner)


def adam(rate: Rate, decay: float, momentum: float) -> optax.GradientTransformation:
    """Adam, L2 in the gradient.

    Args:
      rate: of learning.
      decay: of every parameter.
      momentum: of other optimisers; Adam's is 0.9.
    """
    del momentum
    return optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))


def adamw(rate: Rate, decay: float, momentum: float) -> optax.GradientTransformation:
    """Adam whose decay is no part of the gradient.

    Args:
      rate: of learning.
      decay: of every parameter.
      momentum: of other optimisers; Adam's is 0.9.
    """
    del momentum
    return optax.adamw(rate, weight_decay=decay)


def _is_optimizer(found: Any) -> bool:
    return isinstance(found(0.1), optax.GradientTransformation)


# (learning rate, weight decay, momentum) -> transformation; a user's own takes the
# first alone.
OPTIMIZERS: Registry[Callable[..., optax.GradientTransformation]] = Registry(
    "local.optimizer",
    {
        "sgd": sgd,
        "momentum": heavy_ball,
        "nesterov": nesterov,
        "adam": adam,
        "adamw": adamw,
    },
    schema.Allowed(
        "a function of a learning rate that returns an optax.GradientTransformation",
        _is_optimizer,
    ),
)


def build(
    name: str, rate: Rate, *, decay: float, momentum: float, clip: float
) -> optax.GradientTransformation:
    """The optimiser `name`, of clipped gradients.

    Args:
      name: in `OPTIMIZERS`, or an import path such as "optax:lion".
      rate: of learning.
      decay: L2 in the gradient, or what else the optimiser makes of it.
      momentum: share of the last step in the next one, where there is such.
      clip: largest norm of the gradient of the loss, before L2 is added; 0: none.

    Raises:
      ConfigError: there is no such optimiser.
    """
    make = OPTIMIZERS.find(name)
    if name in OPTIMIZERS:
        tx = make(rate, decay, momentum)
    else:
        tx = optax.chain(optax.add_decayed_weights(decay), make(rate))
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def rate_at(
    schedule: str, rate: float, number: int | Array, *, rounds: int, factor: float
) -> Rate:
    """The learning rate of round `number`.

    Args:
      schedule: of `SCHEDULES`.
      rate: of round 0.
      number: [] of the round, over the study.
      rounds: "step": how many have the same; "cosine": after how many it is least.
      factor: "step": from one to the next; "cosine": from the first to the least.
    """
    if schedule == "constant":
        return rate
    if schedule == "step":
        return rate * factor ** jnp.floor_divide(number, rounds)
    done = jnp.minimum(number / rounds, 1.0)
    return rate * (factor + (1 - factor) * (1 + jnp.cos(math.pi * done)) / 2)


def gradients_in(name: str, momentum: float, steps: int | Array) -> float | Array:
    """How often `steps` steps count a gradient, all together: norm1(a) of FedNova.

    Plain SGD counts each once. With momentum rho the steps after a gradient go along it
    again, each rho times as much as the one before.

    Args:
      name: "sgd", "momentum" or "nesterov".
      momentum: rho.
      steps: K of a round.
    """
    if name == "sgd" or not momentum:
        return steps
    kept = 1 - momentum
    ball = (steps - momentum * (1 - momentum**steps) / kept) / kept
    return ball if name == "momentum" else steps + momentum * ball


def problems(study: Any) -> Iterator[str]:
    """Optimisers that `gradients_in` knows nothing of, for an algorithm's."""
    local = study.local
    if local.optimizer not in LINEAR:
        yield (
            f"local.optimizer = {local.optimizer!r}: must be one of"
            f" {', '.join(LINEAR)} for init.method = {study.init.method!r}, which"
            " counts the gradients in a step"
        )
    if local.clip_norm:
        yield (
            f"local.clip_norm = {local.clip_norm}: must be 0 for init.method ="
            f" {study.init.method!r}, which counts the gradients in a step"
        )
