"""Stage 8: federated rounds from the distilled model, or from that of the rounds."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mosaic_jax.core import schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.fl import anchors
from mosaic_jax.fl.accounting import Release
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.anchors import Anchor
from mosaic_jax.stages import federation, run_rounds, sections
from mosaic_jax.stages.base import Blueprint, Context, Outcome, assess

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Finetune(federation.FederatedStage):
    """Stage 8: the last rounds, with their own learning rate.

    They start from the student, or in studies without one from the global model. Rounds
    that make the student worse on validation images are undone.
    """

    name = "finetune"

    rounds: int = schema.at_least(0, default=40, meaning="federated rounds; 0: none")
    learning_rate: float = schema.above(0, default=1e-4, meaning="of the clients' SGD")
    anchor: str = schema.one_of(
        anchors.KINDS,
        default="none",
        meaning="what of the model they start from keeps clients near it; proximal: its"
        " parameters, distilled: its answers on their images",
    )
    anchor_weight: float = schema.at_least(
        0, default=1.0, meaning="of the anchor in the clients' loss; 0: none"
    )
    anchor_temperature: float = schema.above(
        0, default=1.0, meaning="T of the answers of anchor = distilled"
    )
    max_drop: float = schema.between(
        0,
        1,
        default=0.01,
        meaning="validation accuracy that they may cost the distilled model; where they"
        " cost more, it is the final one",
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Anchors need clients with local SGD; answers, the whole network."""
        if not self.rounds or self._anchor is None:
            return
        algorithm = ALGORITHMS.find(study.init.method)
        told = f"finetune.anchor = {self.anchor!r}: must be"
        if algorithm.exchanges == "prototypes":
            yield (
                f"{told} none for init.method = {study.init.method!r}, whose clients"
                " do not start from one model"
            )
        elif algorithm.holdings not in (Algorithm.holdings, PartialTraining.holdings):
            yield (
                f"{told} none for init.method = {study.init.method!r}, whose clients"
                " run a program of their own"
            )
        elif self.anchor == "distilled" and not algorithm.has_global_model:
            yield (
                f"{told} none or proximal for init.method = {study.init.method!r},"
                " whose server has no model that answers by itself"
            )
        elif self.anchor == "distilled" and federation.is_partial(study):
            yield (
                f"{told} none or proximal for init.method = {study.init.method!r}: a"
                " part of the distilled model does not answer as the whole does"
            )

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

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """The steps of all rounds."""
        return self.releases_of_rounds(study, sizes, self.rounds)

    def run(self, context: Context, round_state: Tree, **start: ModelState) -> Run:
        """Train all rounds, and keep what they made if it is good enough.

        Args:
          context: of the stage.
          round_state: of the rounds before.
          start: the model to start from, by its one name in `needs`.
        """
        settings = context.settings
        ((name, model),) = start.items()
        outcome = yield from run_rounds.train(
            context,
            self.name,
            model,
            self.rounds,
            dataclasses.replace(
                settings.local, learning_rate=self.learning_rate, schedule="constant"
            ),
            first=settings.init.rounds + settings.warmup.rounds,
            round_state=round_state,
            anchor=self._anchor,
        )
        if name == "student":
            outcome = self._checked(context, outcome, model, round_state)
        artifacts = {"final_model": outcome.artifacts["global_model"]}
        models = {k: v for k, v in outcome.models.items() if k != self.name}
        return dataclasses.replace(outcome, artifacts=artifacts, models=models)

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all rounds, and of the anchor's answers."""
        total = self.flops_of_rounds(blueprint, self.rounds)
        if self._anchor is not None and self.anchor == "distilled":
            forward = blueprint.classifier.flops(blueprint.data.info.image_shape)
            total += self.images_of_rounds(blueprint, self.rounds) * forward
        return total

    def _checked(
        self, context: Context, done: Outcome, model: ModelState, round_state: Tree
    ) -> Outcome:
        """What the rounds made, or what they started from if that is much better.

        Args:
          context: of the stage.
          done: what the rounds made.
          model: the distilled model, which they started from.
          round_state: likewise; with it clients have the batch-norm of their own, if
            any, that they had then.
        """
        if "validation" not in context.data.held_out:
            _log.info("finetune: nothing is checked, as there are no validation images")
            return done
        start = assess(context, context.classifier.logits, model)
        before, after = (
            found["validation_accuracy"] for found in (start, done.models["final"])
        )
        # Accuracies are fractions of images: a drop of just `max_drop` may be rounded.
        undone = before - after > self.max_drop + 1e-9
        told = (
            f"The last rounds took validation accuracy from {100 * before:.2f} % to"
            f" {100 * after:.2f} %"
        )
        if undone:
            told += (
                f", lower than finetune.max_drop = {self.max_drop} allows: the final"
                " model is the distilled one, from before them"
            )
            _log.warning("finetune: %s", told)
            done = self._undone(context, done, model, round_state)
        found = {"undone": undone, "before": before, "after": after}
        return dataclasses.replace(
            done,
            results=done.results | {"last_rounds": found},
            section=sections.Section("Accuracy", (sections.Text(f"{told}."),)),
        )

    def _undone(
        self, context: Context, done: Outcome, model: ModelState, round_state: Tree
    ) -> Outcome:
        """`done`, whose bytes were sent, with the models from before the rounds."""
        settings = context.settings
        program = federation.build(context, settings.local)
        state = program.initial_state(model, federation.rounds_key(settings))
        last = settings.init.rounds + settings.warmup.rounds - 1
        outcome = run_rounds.evaluated(
            context, program, self.name, state.replace(**round_state), last=last
        )
        if "stopped" in done.results:
            outcome.results["stopped"] = done.results["stopped"]
        return dataclasses.replace(outcome, up=done.up, down=done.down)

    @property
    def _anchor(self) -> Anchor | None:
        """What keeps clients near the model that the rounds start from."""
        if self.anchor == "none" or not self.anchor_weight:
            return None
        return Anchor(self.anchor, self.anchor_weight, self.anchor_temperature)
