"""Local SGD as a client's program, with the hooks by which algorithms change it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.types import Array, Batch, Client, ModelState, Struct, Tree
from mosaic_jax.fl import training
from mosaic_jax.fl.client_program import ClientProgram, Result, Traffic, Turn
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn.classifier import Classifier

if TYPE_CHECKING:
    from mosaic_jax.fl.anchors import Anchor


class Seen(Struct):
    """What a loss may look at besides logits and parameters.

    Attributes:
      turn: of the client.
      batch: the minibatch; None for penalties of private studies.
      features: [B, F] of its images, before the head; likewise.
      step: int32 [], within the round.
      key: of this client and step.
      classifier: of the client, to ask other models by.
    """

    turn: Turn
    batch: Batch
    features: Array
    step: Array
    key: Array
    classifier: Classifier = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class LocalSGD(ClientProgram):
    """SGD, or what `local` says, from a fresh optimiser, with an algorithm's hooks.

    Attributes:
      classifier: that the client trains.
      algorithm: whose hooks are called.
      local: learning rate and weight decay.
      taught: from parameters and what is seen to a scalar that is added to the loss,
        by training on the server that teaches clients; None: there is none.
      anchor: keeps the client near `turn.anchor`; None: nothing does.
      mechanism: of a private study; None: it is not private.
    """

    classifier: Classifier
    algorithm: "Hooks"
    local: training.Local
    taught: Callable[[Tree, Seen], Array] | None = None
    anchor: "Anchor | None" = None
    mechanism: Mechanism | None = None

    def init(self, turn: Turn) -> Tree:
        """The model that the client starts from, and the optimiser's state."""
        model = self.algorithm.receive(turn.model, turn.state)
        return model, self.optimizer(turn, 0).init(model.params)

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
          The new model and optimiser state, and the loss [] without the penalty; 0 in
          private studies, where it stays with the client.
        """
        if self.mechanism is not None:
            return self._private_step(turn, carry, batch, step), jnp.zeros(())
        carry, loss, _ = self.train(turn, carry, batch, step)
        return carry, loss

    def train(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array, Array]:
        """As `step`, with the features [B, F] of the minibatch before the step.

        Args:
          turn: of the client.
          carry: model and optimiser state.
          batch: the minibatch.
          step: [] int32, number of the step in the turn.
        """
        key = prng.named(turn.key, "hooks")
        key = prng.at(key, turn.number, turn.client.number, step)

        def seen(features: Array) -> Seen:
            return Seen(turn, batch, features, step, key, self.classifier)

        def penalty(params: Tree, features: Array) -> Array:
            added = self.algorithm.penalty(params, seen(features))
            if self.taught is not None:
                added += self.taught(params, seen(features))
            if self.anchor is not None:
                added += self.anchor.penalty(self, params, seen(features))
            return added

        model, opt_state = carry
        model, opt_state, loss, features = training.sgd_step_and_features(
            self.classifier,
            self.optimizer(turn, step),
            model,
            opt_state,
            batch,
            adjust_logits=lambda logits, features: self.algorithm.logits(
                logits, seen(features)
            ),
            penalty=penalty,
        )
        return (model, opt_state), loss, features

    def _private_step(self, turn: Turn, carry: Tree, batch: Batch, step: Array) -> Tree:
        """As `step`: hooks see logits image by image, and penalties see no image."""
        assert self.mechanism is not None and self.taught is None
        counters = turn.number, turn.client.number, step
        key = prng.at(prng.named(turn.key, "hooks"), *counters)

        def seen(batch: Any, features: Any) -> Seen:
            return Seen(turn, batch, features, step, key, self.classifier)

        def penalty(params: Tree) -> Array:
            added = self.algorithm.penalty(params, seen(None, None))
            if self.anchor is not None:
                added += self.anchor.penalty(self, params, seen(None, None))
            return added

        model, opt_state = carry
        return training.private_step(
            self.classifier,
            self.optimizer(turn, step),
            model,
            opt_state,
            batch,
            mechanism=self.mechanism,
            client=turn.client,
            batch_size=self.local.batch_size,
            key=prng.at(prng.named(turn.key, "privacy"), *counters),
            adjust_logits=lambda logits, features, image: self.algorithm.logits(
                logits, seen(image, features)
            ),
            penalty=penalty,
        )

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
        """What is sent of the model one way, the upload the other."""
        up, down = self.messages(image_shape, client)
        return Traffic(trees.num_bytes(up), trees.num_bytes(down))

    def messages(
        self, image_shape: tuple[int, int, int], client: Client
    ) -> tuple[Tree, Tree]:
        """Shapes of the upload, and of what the client gets before."""
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
        return upload, (self.algorithm.download(model), turn.server)

    def optimizer(self, turn: Turn, step: int | Array) -> optax.GradientTransformation:
        """Of local step `step` = 0, 1, ...; the state of all steps has one form."""
        del step
        return training.optimizer(self.local, turn.number)


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


def with_mechanism(
    program: ClientProgram, mechanism: Mechanism | None
) -> ClientProgram:
    """Local SGD of a client of a private study; any program of one that is not.

    Args:
      program: of the client.
      mechanism: of the study; None: it is not private.

    Raises:
      ConfigError: the client does something else.
    """
    if mechanism is None:
        return program
    if not isinstance(program, LocalSGD):
        raise errors.ConfigError(
            f"init.method: clients run {type(program).__name__}: must run LocalSGD for"
            " privacy.epsilon > 0"
        )
    return dataclasses.replace(program, mechanism=mechanism)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What an algorithm may change of `LocalSGD`, all about one client.

    By default nothing: federated averaging.
    """

    # The server's state goes to the clients with the model.
    sends_state = False
    # Passes of a minibatch forward through the network, in each step, beside training.
    further_passes = 0
    # The client tells of its images by the gradients of `LocalSGD` alone: the loss is a
    # mean over images, of which `logits` sees one at a time, and a penalty that sees
    # none; what else is sent or kept is made of the trained model. Private studies need
    # it. It is not inherited: each class says so itself.
    per_image = False
    # The loss depends on the client's numbers of images of each class.
    reads_label_counts = False

    def init_server(self, model: ModelState) -> Tree:
        """State that the server keeps across rounds, before the first one."""
        del model
        return {}

    def init_client(self, model: ModelState) -> Tree:
        """State that one client keeps across rounds, before its first one."""
        del model
        return {}

    def download(self, model: ModelState) -> Tree:
        """What of the global model clients are sent; the rest they must not use."""
        return model

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The model that a client starts from.

        Args:
          model: global, as it was sent.
          client_state: what the client kept.
        """
        del client_state
        return model

    def personal_model(self, model: ModelState, client_state: Tree) -> ModelState:
        """The model that a client with one of its own is judged by.

        Args:
          model: global.
          client_state: what the client kept.
        """
        return self.receive(model, client_state)

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

    def reference(self, model: ModelState) -> Tree:
        """An upload like those of `upload`, of a client that has learnt nothing.

        Attacks and compression change the difference of an upload from it. Where an
        upload is no model, override this and `sent_model`.

        Args:
          model: global, as it was sent.
        """
        return model

    def sent_model(self, upload: Tree, model: ModelState) -> ModelState:
        """A client's model as the server reads it from its upload.

        Args:
          upload: of the client.
          model: global, as it was sent.
        """
        del model
        return upload

    def program(self, classifier: Classifier, local: training.Local) -> LocalSGD:
        """What a client with the whole network does in a round.

        Args:
          classifier: that the client trains.
          local: settings of its SGD.
        """
        return LocalSGD(classifier, self, local)
