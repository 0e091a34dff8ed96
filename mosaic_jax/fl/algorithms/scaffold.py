"""SCAFFOLD (Karimireddy et al., 2020): control variates take the drift out of steps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core import flops, schema, trees
from mosaic_jax.core.types import Array, Batch, ModelState, Tree
from mosaic_jax.fl import optimizers, training
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Result, Turn
from mosaic_jax.fl.local_sgd import LocalSGD, Seen
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Scaffold(Algorithm):
    """Stochastic controlled averaging (Karimireddy et al., 2020; algorithm 1).

    A client at w_i steps along `g(w_i) - c_i + c`, and then replaces c_i by an estimate
    of its gradient at the global w: with option I its mean gradient there over the
    minibatches of the round, with option II `c_i - c + (w - w_i) / (K eta)` after K
    steps. It sends w_i and the change of c_i; the server moves w by
    `server_learning_rate` times the mean of w_i - w, and c by the share of clients that
    took part times the mean change. Means are weighted by sample counts here, as
    everywhere in this library; the paper's are uniform. Batch-norm statistics are
    averaged.
    """

    sends_state = True

    option: str = schema.one_of(
        ("I", "II"),
        default="II",
        meaning="of c_i: I, gradients at the global model; II, of the steps taken",
    )
    server_learning_rate: float = schema.above(
        0, default=1.0, meaning="eta_g, of the mean change of the parameters"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Option II needs steps that are sums of gradients."""
        if self.option == "II":
            yield from optimizers.problems(study)

    @property
    def per_image(self) -> bool:
        """With option II, whose c_i are made of models."""
        return self.option == "II"

    @property
    def further_passes(self) -> int:
        """The gradients at the global model, with option I."""
        return flops.TRAINED if self.option == "I" else 0

    def init_server(self, model: ModelState) -> Tree:
        """The mean c of the clients' c_i, 0 at first."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def init_client(self, model: ModelState) -> Tree:
        """The client's c_i, 0 at first."""
        return jax.tree.map(jnp.zeros_like, model.params)

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """`<c - c_i, w>`, whose gradient is the correction of a step."""
        terms = jax.tree.map(
            lambda w, c, own: jnp.sum((c - own) * w),
            params,
            seen.turn.server,
            seen.turn.state,
        )
        return trees.total(terms)

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The local model with the change of c_i, and c_i, by option II."""
        del loss
        way = way_of(turn)
        control = jax.tree.map(
            lambda own, c, old, w: own - c + (old - w) / way,
            turn.state,
            turn.server,
            turn.model.params,
            trained.params,
        )
        return sent(turn, trained, control), control

    def reference(self, model: ModelState) -> Tree:
        """The model as it was sent, and no change."""
        zero = jax.tree.map(jnp.zeros_like, model.params)
        return {"model": model, "change": zero}

    def sent_model(self, upload: Tree, model: ModelState) -> ModelState:
        """Its part of the upload."""
        del model
        return upload["model"]

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """Move the parameters and c by the clients' mean changes."""
        mean, change = mean_upload["model"], mean_upload["change"]
        params = jax.tree.map(
            lambda old, w: old + self.server_learning_rate * (w - old),
            model.params,
            mean.params,
        )
        state = jax.tree.map(lambda c, d: c + share * d, server_state, change)
        return state, mean.replace(params=params)

    def program(self, classifier: Classifier, local: training.Local) -> LocalSGD:
        """Local SGD, that of option I with gradients at the global model."""
        kind = FirstOption if self.option == "I" else LocalSGD
        return kind(classifier, self, local)


@dataclasses.dataclass(frozen=True)
class FirstOption(LocalSGD):
    """Local SGD that sums the gradients of its minibatches at the global model."""

    def init(self, turn: Turn) -> Tree:
        """What local SGD starts from, and a sum of gradients."""
        zero = jax.tree.map(jnp.zeros_like, turn.model.params)
        return super().init(turn), zero

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step, and the gradient of cross-entropy and L2 at the global model."""
        trained, total = carry
        trained, loss = super().step(turn, trained, batch, step)
        slope, _ = training.gradient(self.classifier, turn.model, batch)
        total = jax.tree.map(
            lambda total, slope, w: total + slope + self.local.weight_decay * w,
            total,
            slope,
            turn.model.params,
        )
        return (trained, total), loss

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """The mean gradient at the global model becomes c_i."""
        del loss
        (trained, _), total = carry
        control = jax.tree.map(lambda total: total / turn.steps, total)
        return Result(sent(turn, trained, control), trained, control)


def way_of(turn: Turn) -> float | Array:
    """How far all steps of the turn go along a gradient: K eta of plain SGD."""
    local = turn.local
    counted = optimizers.gradients_in(local.optimizer, local.momentum, turn.steps)
    return counted * training.learning_rate(local, turn.number)


def sent(turn: Turn, trained: ModelState, control: Tree) -> Tree:
    """What a client sends: its model, and the change from its last c_i to `control`.

    Args:
      turn: of the client.
      trained: its model after the last step.
      control: the new c_i.
    """
    return {
        "model": trained,
        "change": jax.tree.map(jnp.subtract, control, turn.state),
    }
