"""What one client does in a federated round: a program of `init`, `step`s and `final`.

A round hands every client that takes part a `Turn` and runs its program. The library's
own program is local SGD with the hooks of an `Algorithm`; one that trains otherwise is
a class with these three functions.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import errors, prng, steps, trees
from mosaic_jax.core.types import Array, Batch, Client, ModelState, Struct, Tree
from mosaic_jax.fl import training
from mosaic_jax.nn.classifier import Classifier


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
    """

    model: ModelState
    server: Tree
    client: Client
    state: Tree
    number: Array
    key: Array
    local: training.Local = flax.struct.field(pytree_node=False)
    lesson: Tree = flax.struct.field(default_factory=dict)


class Result(Struct):
    """What a client has at the end of its turn.

    Attributes:
      upload: what it sends; only the weighted mean over clients is ever formed.
      model: that it trained.
      state: what it keeps until its next round.
    """

    upload: Tree
    model: ModelState
    state: Tree


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
    num_steps: int,
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


class Seen(Struct):
    """What a loss may look at besides logits and parameters.

    Attributes:
      turn: of the client.
      batch: the minibatch.
      features: [B, F] of its images, before the head.
      step: int32 [], within the round.
      key: of this client and step.
    """

    turn: Turn
    batch: Batch
    features: Array
    step: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class LocalSGD(ClientProgram):
    """Plain SGD from a fresh optimiser, changed by the hooks of an algorithm.

    Attributes:
      classifier: that the client trains.
      algorithm: whose hooks are called.
      local: learning rate and weight decay.
      taught: from parameters and what is seen to a scalar that is added to the loss,
        by training on the server that teaches clients; None: there is none.
    """

    classifier: Classifier
    algorithm: "Hooks"
    local: training.Local
    taught: Callable[[Tree, Seen], Array] | None = None

    def init(self, turn: Turn) -> Tree:
        """The model that the client starts from, and the optimiser's state."""
        model = self.algorithm.receive(turn.model, turn.state)
        return model, self._tx.init(model.params)

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step on cross-entropy and penalty.

        Args:
          turn: of the client.
          carry: model and optimiser state.
          batch: images [B, H, W, D] in [-1, 1], labels and mask [B].
          step: [] int32, within the round.

        Returns:
          The new model and optimiser state, and the loss [] without the penalty.
        """
        key = prng.named(turn.key, "hooks")
        key = prng.at(key, turn.number, turn.client.number, step)

        def seen(features: Array) -> Seen:
            return Seen(turn, batch, features, step, key)

        def penalty(params: Tree, features: Array) -> Array:
            added = self.algorithm.penalty(params, seen(features))
            if self.taught is not None:
                added += self.taught(params, seen(features))
            return added

        model, opt_state = carry
        model, opt_state, loss = training.sgd_step(
            self.classifier,
            self._tx,
            model,
            opt_state,
            batch,
            adjust_logits=lambda logits, features: self.algorithm.logits(
                logits, seen(features)
            ),
            penalty=penalty,
        )
        return (model, opt_state), loss

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """Upload and state by the algorithm.

        Args:
          turn: of the client.
          carry: model and optimiser state after the last step.
          loss: [] mean over the steps.
        """
        upload, state = self.algorithm.upload(turn, carry[0], loss)
        return Result(upload, carry[0], state)

    def traffic(self, image_shape: tuple[int, int, int], client: Client) -> Traffic:
        """The model one way, the upload the other."""
        model = jax.eval_shape(
            functools.partial(self.classifier.init, image_shape=image_shape),
            jax.eval_shape(prng.root, 0),
        )

        def sent(model: ModelState, turn: Turn) -> Tree:
            return self.algorithm.upload(turn, model, jnp.zeros(()))[0]

        server = jax.eval_shape(self.algorithm.init_server, model)
        turn = Turn(
            model=model,
            server=server if self.algorithm.sends_state else {},
            client=client,
            state=jax.eval_shape(self.algorithm.init_client, model),
            number=trees.shape((), jnp.int32),
            key=jax.eval_shape(prng.root, 0),
            local=self.local,
        )
        upload = jax.eval_shape(sent, model, turn)
        down = trees.num_bytes(model) + trees.num_bytes(turn.server)
        return Traffic(trees.num_bytes(upload), down)

    @property
    def _tx(self) -> optax.GradientTransformation:
        return training.sgd(self.local.learning_rate, self.local.weight_decay)


def with_lesson(
    program: ClientProgram, penalty: Callable[[Tree, Seen], Array]
) -> LocalSGD:
    """Local SGD of a client that training on the server teaches.

    Args:
      program: of the client.
      penalty: from parameters and what is seen to what is added to the loss, [].

    Raises:
      ConfigError: the client does something else.
    """
    if not isinstance(program, LocalSGD):
        raise errors.ConfigError(
            f"init.method: clients run {type(program).__name__}: must run LocalSGD for"
            " a server.method that teaches them"
        )
    return dataclasses.replace(program, taught=penalty)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What an algorithm may change of `LocalSGD`, all about one client.

    By default nothing: federated averaging.
    """

    # The server's state goes to the clients with the model.
    sends_state = False

    def init_server(self, model: ModelState) -> Tree:
        """State that the server keeps across rounds, before the first one."""
        del model
        return {}

    def init_client(self, model: ModelState) -> Tree:
        """State that one client keeps across rounds, before its first one."""
        del model
        return {}

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The model that a client starts from.

        Args:
          model: global, as it was sent.
          client_state: what the client kept.
        """
        del client_state
        return model

    def logits(self, logits: Array, seen: Seen) -> Array:
        """Logits [B, K] as the local cross-entropy sees them."""
        del seen
        return logits

    def penalty(self, params: Tree, seen: Seen) -> Array:
        """[] float32 added to the local cross-entropy."""
        del params, seen
        return jnp.zeros(())

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """What a client sends after training, and its new state.

        Args:
          turn: of the client: `turn.model` is what it got, `turn.state` what it kept.
          trained: its model after the last step.
          loss: [] mean over its steps.
        """
        del loss
        return trained, turn.state
