"""Ditto (Li et al., 2021): beside FedAvg, a personal model near the global one."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import flops, schema, trees
from mosaic_jax.core.types import Array, Batch, ModelState, Tree
from mosaic_jax.fl import training
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Result, Turn
from mosaic_jax.fl.local_sgd import LocalSGD
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Ditto(Algorithm):
    """FedAvg with personal models beside it (Li et al., ICML 2021; algorithm 1).

    On every minibatch on which a client trains the model that it sends, it also trains
    a model v_i of its own, `v_i <- v_i - eta (g(v_i) + lambda (v_i - w))` with the
    global w that it received. No v_i leaves its client.
    """

    personal = True
    # Training v_i.
    further_passes = flops.TRAINED

    pull: float = schema.at_least(
        0, default=0.1, meaning="lambda, towards the global model; 0: local training"
    )

    def init_client(self, model: ModelState) -> Tree:
        """The personal model v_i, at first the initial one."""
        return model

    def personal_model(self, model: ModelState, client_state: Tree) -> ModelState:
        """v_i."""
        del model
        return client_state

    def program(self, classifier: Classifier, local: training.Local) -> LocalSGD:
        """Local SGD of both models."""
        return BothModels(classifier, self, local)


@dataclasses.dataclass(frozen=True)
class BothModels(LocalSGD):
    """Local SGD that trains the client's personal model as well."""

    algorithm: Ditto

    def init(self, turn: Turn) -> Tree:
        """What local SGD starts from, for the one to be sent and for the own one."""
        own = turn.state, self.optimizer(turn, 0).init(turn.state.params)
        return super().init(turn), own

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step of each; the loss is that of the model that is sent."""
        sent, (own, opt_state) = carry
        sent, loss = super().step(turn, sent, batch, step)

        def penalty(params: Tree, features: Array) -> Array:
            del features
            squares = jax.tree.map(
                lambda v, w: jnp.sum((v - w) ** 2), params, turn.model.params
            )
            return self.algorithm.pull / 2 * trees.total(squares)

        own, opt_state, _ = training.sgd_step(
            self.classifier,
            self.optimizer(turn, step),
            own,
            opt_state,
            batch,
            penalty=penalty,
        )
        return (sent, (own, opt_state)), loss

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """The model of FedAvg is sent, the personal one kept."""
        sent, (own, _) = carry
        return dataclasses.replace(super().final(turn, sent, loss), state=own)
