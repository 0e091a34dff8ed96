"""Stage 3: further federated rounds after the clients have sent their generators."""

import dataclasses
from typing import TYPE_CHECKING

from mosaic_jax.core import schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import ClientModels, ModelState, Tree
from mosaic_jax.stages import federation, run_rounds
from mosaic_jax.stages.base import Blueprint, Context

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Warmup(federation.FederatedStage):
    """Stage 3: further federated rounds."""

    name = "warmup"

    rounds: int = schema.at_least(0, default=40, meaning="federated rounds; 0: none")

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The models and states after the rounds before."""
        return federation.round_artifacts(study)

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The same models and states, after further rounds."""
        return federation.round_artifacts(study)

    def run(
        self,
        context: Context,
        global_model: ModelState,
        round_state: Tree,
        client_models: ClientModels | None = None,
    ) -> Run:
        """Train all rounds."""
        return run_rounds.train(
            context,
            self.name,
            global_model,
            self.rounds,
            context.settings.local,
            first=context.settings.init.rounds,
            round_state=round_state,
            client_models=client_models,
        )

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all rounds."""
        return self.flops_of_rounds(blueprint, self.rounds)
