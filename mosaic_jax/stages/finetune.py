"""Stage 8: federated rounds from the distilled model, or from that of the rounds."""

import dataclasses
from typing import TYPE_CHECKING

from mosaic_jax.core import schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.stages import federation, run_rounds
from mosaic_jax.stages.base import Blueprint, Context

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Finetune(federation.FederatedStage):
    """Stage 8: the last rounds, with their own learning rate.

    They start from the student, or in studies without one from the global model.
    """

    name = "finetune"

    rounds: int = schema.at_least(0, default=40, meaning="federated rounds; 0: none")
    learning_rate: float = schema.above(0, default=1e-4, meaning="of the clients' SGD")

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The model to start from, and the state of the rounds before."""
        student = study.method == "mosaic" or study.trains_once
        return ("student" if student else "global_model", "round_state")

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The study's final model."""
        del study
        return ("final_model",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Also the number of rounds before, as rounds are counted over the study."""
        return (*super().reads(study), "warmup")

    def run(self, context: Context, round_state: Tree, **start: ModelState) -> Run:
        """Train all rounds.

        Args:
          context: of the stage.
          round_state: of the rounds before.
          start: the model to start from, by its one name in `needs`.
        """
        settings = context.settings
        (model,) = start.values()
        outcome = yield from run_rounds.train(
            context,
            self.name,
            model,
            self.rounds,
            dataclasses.replace(settings.local, learning_rate=self.learning_rate),
            first=settings.init.rounds + settings.warmup.rounds,
            round_state=round_state,
        )
        artifacts = {"final_model": outcome.artifacts["global_model"]}
        models = {k: v for k, v in outcome.models.items() if k != self.name}
        return dataclasses.replace(outcome, artifacts=artifacts, models=models)

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all rounds."""
        return self.flops_of_rounds(blueprint, self.rounds)
