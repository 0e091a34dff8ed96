"""FedRep (Collins et al., 2021): personal heads, then the shared representation."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import optax

from mosaic_jax.core import schema, trees
from mosaic_jax.core.types import Array, Batch, Tree
from mosaic_jax.fl import training
from mosaic_jax.fl.algorithms.personal_layers import PersonalLayers
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import LocalSGD
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class FedRep(PersonalLayers):
    """Personal heads, fitted before the rest (Collins et al., ICML 2021; algorithm 1).

    In a round a client first trains its own layers with all others frozen, then the
    others with its own frozen, each from a fresh optimiser. Running statistics of
    batch-norm move throughout.
    """

    per_image = True

    head_share: float = schema.field(
        0.9,
        "in (0, 1)",
        lambda x: 0 < x < 1,
        "of a round's steps, that train the head; the rest train the representation",
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Also rounds too short for both."""
        yield from super().problems(study)
        if study.local.steps < 2 and not study.local.epochs:
            yield (
                f"local.steps = {study.local.steps}: must be >= 2 for init.method ="
                f" {study.init.method!r}, whose clients train in two phases"
            )

    def head_steps(self, steps: int | Array) -> Array:
        """How many of a round's `steps` train the head: at least one, and not all.

        A single step, of a client with few images or little time, trains the head.
        """
        count = jnp.rint(self.head_share * steps).astype(jnp.int32)
        return jnp.clip(count, 1, jnp.maximum(steps - 1, 1))

    def program(self, classifier: Classifier, local: training.Local) -> LocalSGD:
        """Local SGD in two phases."""
        return TwoPhases(classifier, self, local)


@dataclasses.dataclass(frozen=True)
class TwoPhases(LocalSGD):
    """Local SGD of the head alone, then of the representation alone."""

    algorithm: FedRep

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step on what this phase trains."""
        model, opt_state = carry
        fresh = self.optimizer(turn, step).init(model.params)
        switch = step == self.algorithm.head_steps(turn.steps)
        opt_state = trees.select(switch, fresh, opt_state)
        return super().step(turn, (model, opt_state), batch, step)

    def optimizer(self, turn: Turn, step: int | Array) -> optax.GradientTransformation:
        """That of local SGD, for which what is frozen is 0 and does not move."""
        tx = super().optimizer(turn, step)
        head_moves = jnp.asarray(step < self.algorithm.head_steps(turn.steps))

        def moving(tree: Tree) -> Tree:
            return flax.traverse_util.path_aware_map(
                lambda path, leaf: jnp.where(
                    head_moves == self.algorithm.is_own("/".join(map(str, path))),
                    leaf,
                    0,
                ),
                tree,
            )

        def update(
            updates: Tree, state: Tree, params: Tree = None
        ) -> tuple[Tree, Tree]:
            change, state = tx.update(moving(updates), state, moving(params))
            return moving(change), state

        return optax.GradientTransformation(tx.init, update)
