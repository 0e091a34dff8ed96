"""Stage 3: further federated rounds after the clients have sent their generators."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from mosaic_jax.core import schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import ClientModels, ModelState, Tree
from mosaic_jax.fl.accounting import Release
from mosaic_jax.stages import federation, gathering, run_rounds
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
        """The same models and states, after further rounds, and what they gathered."""
        gathered = ("gathered",) if self._gathers(study) else ()
        return (*federation.round_artifacts(study), *gathered)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Also how prototypes are made, where they are gathered."""
        own = ("prototypes",) if self._gathers(study) else ()
        return (*super().reads(study), *own)

    def _gathers(self, study: "Settings") -> bool:
        """Whether clients send prototypes in every round."""
        return study.method == "mosaic" and study.prototypes.gathered == "every_round"

    def reads_images(self, study: "Settings") -> bool:
        """Also where prototypes are gathered."""
        return super().reads_images(study) or self._gathers(study)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Models and states after the rounds, and the prototypes of all of them."""
        gathered = gathering.template(blueprint)
        return super().template(blueprint) | {"gathered": gathered}

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """The steps of all rounds."""
        return self.releases_of_rounds(study, sizes, self.rounds)

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
        total = self.flops_of_rounds(blueprint, self.rounds)
        if "gathered" in blueprint.provides:
            total += self.rounds * gathering.flops_of_round(blueprint)
        return total
