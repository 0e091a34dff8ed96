"""Stage 1: federated rounds from a global model that is random, or was trained."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from clu import parameter_overview

from mosaic_jax.core import prng, programs, schema, trees
from mosaic_jax.core.steps import Run
from mosaic_jax.fl import privacy
from mosaic_jax.fl.accounting import Release
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.stages import federation, private, run_rounds
from mosaic_jax.stages.base import Blueprint, Context

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Init(federation.FederatedStage):
    """Stage 1: federated rounds from a random global model, or from `model.start`."""

    name = "init"
    makes_model = True

    method: str = schema.component(
        ALGORITHMS, default="fedavg", meaning="federated algorithm of every round"
    )
    rounds: int = schema.at_least(1, default=300, meaning="federated rounds")
    clients_per_round: int = schema.at_least(
        0, default=0, meaning="clients drawn anew for each round; 0: all"
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Partial participation needs enough clients, and one network."""
        if self.clients_per_round > study.data.num_clients:
            yield (
                f"init.clients_per_round = {self.clients_per_round}: must be <="
                f" data.num_clients = {study.data.num_clients}"
            )
        some = bool(self.clients_per_round and study.model.others)
        if some and not study.exchanges_prototypes:
            yield (
                f"init.clients_per_round = {self.clients_per_round!r}: must be 0 where"
                f" clients have different networks, model.others = {study.model.others}"
            )

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The models and states after the rounds."""
        return federation.round_artifacts(study)

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """Also the label counts, where anything reads them."""
        rounds = self.releases_of_rounds(study, sizes, self.rounds)
        if not federation.sends_label_counts(study):
            return rounds
        return (*rounds, Release(privacy.LABEL_COUNTS, np.ones_like(sizes)))

    def run(self, context: Context) -> Run:
        """Train all rounds."""
        key = prng.named(context.key, "model")
        init = programs.jit(context.classifier.init, static_argnums=1)
        model = init(key, context.data.info.image_shape)
        model = trees.replaced(model, context.start)
        outcome = yield from run_rounds.train(
            context, self.name, model, self.rounds, context.settings.local, first=0
        )
        outcome.results["num_parameters"] = int(
            parameter_overview.count_parameters(model.params)
        )
        # Once, of all clients.
        if context.privacy is not None and context.name == next(iter(context.networks)):
            outcome = private.told(context.privacy, outcome)
        return outcome

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all rounds."""
        return self.flops_of_rounds(blueprint, self.rounds)
