"""Our algorithms with the definitions of a peer, where those are others.

Each differs from the library's own in what its first line says, and in nothing else:
where a peer's weights then are ours, nothing else differs between the two programs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.fedopt import FedAdam
from mosaic_jax.fl.algorithms.moon import Moon
from mosaic_jax.fl.algorithms.scaffold import Scaffold, sent, way_of
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import Seen


@dataclasses.dataclass(frozen=True)
class UniformScaffold(Scaffold):
    """Clients count alike, as in the paper."""

    def weight(self, size: Array) -> Array:
        """One for each client."""
        return jnp.ones_like(size)


@dataclasses.dataclass(frozen=True)
class OppositeScaffold(UniformScaffold):
    """Moreover a client's new variate has minus the gradient of its steps.

    It is `c_i - c + (w_i - w) / (K eta)`, the paper's `c_i - c + (w - w_i) / (K eta)`;
    steps are along `g(w_i) - c_i + c` all the same.
    """

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The local model with the change of c_i, and c_i."""
        del loss
        way = way_of(turn)
        control = jax.tree.map(
            lambda own, c, old, w: own - c + (w - old) / way,
            turn.state,
            turn.server,
            turn.model.params,
            trained.params,
        )
        return sent(turn, trained, control), control


@dataclasses.dataclass(frozen=True)
class PlainFedAdam(FedAdam):
    """The first rounds' moments are not corrected, as in the paper's algorithm 2."""

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """`w <- w - eta m / (sqrt(v) + tau)`, with m and v from 0."""

        def init(params: Tree) -> Tree:
            zero = jax.tree.map(jnp.zeros_like, params)
            return zero, zero

        def update(slope: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
            del params
            first, second = self.beta_1, self.beta_2
            m = jax.tree.map(lambda m, g: first * m + (1 - first) * g, state[0], slope)
            v = jax.tree.map(
                lambda v, g: second * v + (1 - second) * g**2, state[1], slope
            )
            rate = self.server_learning_rate
            change = jax.tree.map(
                lambda m, v: -rate * m / (jnp.sqrt(v) + self.tau), m, v
            )
            return change, (m, v)

        return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class MoonFromReceived(Moon):
    """Until a client has a model of its own, the one that it receives stands for it.

    Its contrast is then constant, and the first round of each client one of FedAvg.
    """

    def init_client(self, model: ModelState) -> Tree:
        """Room for a model, and that it is not there."""
        return model, jnp.zeros((), bool)

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """As `Moon.penalty`."""
        own, is_there = seen.turn.state
        own = trees.select(is_there, own, seen.turn.model)
        turn = seen.turn.replace(state=own)
        return super().penalty(params, seen.replace(turn=turn))

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The local model, which the client keeps as well."""
        del turn, loss
        return trained, (trained, jnp.ones((), bool))
