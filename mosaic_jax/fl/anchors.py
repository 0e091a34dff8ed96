"""Anchors: what keeps clients near one model through all rounds of a stage."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.fl.client_program import ClientProgram
from mosaic_jax.fl.local_sgd import LocalSGD, Seen
from mosaic_jax.fl.parts import NarrowSGD
from mosaic_jax.nn import losses

KINDS = ("none", "proximal", "distilled")


@dataclasses.dataclass(frozen=True)
class Anchor:
    """What clients add to their loss so that they stay near `turn.anchor`.

    Attributes:
      kind: "proximal", `weight / 2` times the squared distance from its parameters, as
        FedProx has it, or "distilled", `weight T^2 KL(anchor || own)` of the softmaxes
        on the client's minibatch, as knowledge distillation has it.
      weight: of the term, > 0.
      temperature: T of the softmaxes, > 0.
    """

    kind: str
    weight: float
    temperature: float

    def penalty(self, program: LocalSGD, params: Tree, seen: Seen) -> Array:
        """[] float32 added to the loss of a client that runs `program`.

        Args:
          program: of the client.
          params: of its model.
          seen: what a loss may look at.
        """
        term = self._distance if self.kind == "proximal" else self._divergence
        return self.weight * term(program, params, seen)

    def _distance(self, program: LocalSGD, params: Tree, seen: Seen) -> Array:
        """Half the squared distance from the anchor, as this client would receive it.

        So what an algorithm leaves to each client, as FedBN does batch-norm, is not
        drawn to the others'.
        """
        near = program.algorithm.receive(seen.turn.anchor, seen.turn.state)
        squares = jax.tree.map(
            lambda w, old: jnp.sum((w - old) ** 2), params, near.params
        )
        return trees.total(squares) / 2

    def _divergence(self, program: LocalSGD, params: Tree, seen: Seen) -> Array:
        """T^2 KL from the anchor's answers, by its running statistics, to the client's.

        These are the model's own logits, without an algorithm's factors or margins.
        """
        turn, classifier = seen.turn, program.classifier
        told = classifier.logits(turn.anchor, seen.batch.image)
        model = turn.model.replace(params=params)
        own = classifier.head(model, seen.features)
        apart = losses.kl(told / self.temperature, own / self.temperature)
        return self.temperature**2 * losses.masked_mean(apart, seen.batch.mask)


def anchored(program: ClientProgram, anchor: Anchor | None) -> ClientProgram:
    """Local SGD, of the whole network or a part, with the anchor, if any, in its loss.

    Args:
      program: of a client.
      anchor: of all rounds of a stage; None: there is none, and any program will do.
    """
    if anchor is None:
        return program
    if isinstance(program, NarrowSGD):
        inner = dataclasses.replace(program.inner, anchor=anchor)
        return dataclasses.replace(program, inner=inner)
    assert isinstance(program, LocalSGD)  # stages refuse others before any work
    return dataclasses.replace(program, anchor=anchor)
