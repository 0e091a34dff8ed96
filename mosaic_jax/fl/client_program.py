"""What one client does in a federated round: a program of `init`, `step`s and `final`.

A round hands every client that takes part a `Turn` and runs its program. The library's
own program is local SGD with the hooks of an `Algorithm` (`fl/local_sgd.py`); one that
trains otherwise is a class with these three functions.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax.numpy as jnp

from mosaic_jax.core import steps
from mosaic_jax.core.types import Array, Batch, Client, ModelState, Struct, Tree
from mosaic_jax.fl import training


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes from clients to the server, and from the server to clients."""

    up: int
    down: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.up + other.up, self.down + other.down)

    def __rmul__(self, count: int) -> "Traffic":
        return Traffic(count * self.up, count * self.down)


class Turn(Struct):
    """One client in one round.

    Attributes:
      model: the global model as it was sent.
      server: the server's state, of algorithms that send it along, else {}.
      client: what it holds.
      state: what it kept from its last round.
      number: int32 [] of the round, over the study.
      key: of all rounds of the study; fold in what it is for, the round, the client.
      local: the SGD of these rounds: number of steps, learning rate.
      lesson: what training on the server sends along, of methods that do, else {}.
      anchor: the model that clients stay near in all rounds of a stage, else {}.
      clip: [] the longest update that counts in full, else ().
      done: int32 [] of local steps in this turn; None: `local.steps`.
      error: what compression left out of the client's uploads so far, else ().
    """

    model: ModelState
    server: Tree
    client: Client
    state: Tree
    number: Array
    key: Array
    local: training.Local = flax.struct.field(pytree_node=False)
    lesson: Tree = flax.struct.field(default_factory=dict)
    anchor: Tree = flax.struct.field(default_factory=dict)
    clip: Tree = ()
    done: Array | None = None
    error: Tree = ()

    @property
    def steps(self) -> int | Array:
        """Number of local steps in this turn, [] int32 where clients' differ."""
        return self.local.steps if self.done is None else self.done


class Result(Struct):
    """What a client has at the end of its turn.

    Attributes:
      upload: what it sends; only the weighted mean over clients is ever formed, unless
        a robust rule or an attack asks for each one.
      model: that it trained; where uploads are attacked or compressed, as the server
        reads it from the upload.
      state: what it keeps until its next round.
      error: what compression left out of the uploads so far, else ().
    """

    upload: Tree
    model: ModelState
    state: Tree
    error: Tree = ()


class ClientProgram:
    """The work of one client: pure functions, batched over clients by the caller."""

    def init(self, turn: Turn) -> Tree:
        """The state that steps hand on, such as model and optimiser, at the start."""
        raise NotImplementedError

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """Local step `step` = 0, 1, ... on the client's next minibatch.

        Args:
          turn: of the client.
          carry: of the step before, or of `init`.
          batch: images [B, H, W, D] in [-1, 1], labels and mask [B].
          step: int32 [], within the round.

        Returns:
          The new carry, and the loss [] that is recorded.
        """
        raise NotImplementedError

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """What the client sends and keeps after its last step.

        Args:
          turn: of the client.
          carry: of the last step.
          loss: [] mean over the steps.
        """
        raise NotImplementedError

    def traffic(self, image_shape: tuple[int, int, int], client: Client) -> Traffic:
        """Bytes that one client sends and gets in a round."""
        raise NotImplementedError


def run(
    program: ClientProgram,
    turn: Turn,
    batch_at: Callable[[Array], Batch],
    num_steps: int | Array,
) -> tuple[Result, Array]:
    """Run a client's turn: `init`, `num_steps` steps, `final`.

    Args:
      program: of the client.
      turn: of the client.
      batch_at: the minibatch of step 0, 1, ...
      num_steps: >= 0.

    Returns:
      The result of the turn, and the mean loss [] over its steps.
    """

    def body(step: Array, carry: tuple[Tree, Array]) -> tuple[Tree, Array]:
        inner, total = carry
        inner, loss = program.step(turn, inner, batch_at(step), step)
        return inner, total + loss

    start = (program.init(turn), jnp.zeros(()))
    carry, total = steps.train(0, num_steps, body, start)
    loss = total / jnp.maximum(num_steps, 1)
    return program.final(turn, carry, loss), loss
