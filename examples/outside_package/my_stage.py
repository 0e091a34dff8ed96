"""A stage that measures whether the global model is as sure as it is right."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mosaic_jax.core import schema
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import evaluation
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import Context, Outcome, Stage

MEANING = "mean confidence minus accuracy on test images; above 0: too sure of itself"


@dataclasses.dataclass(frozen=True)
class Confidence(Stage):
    """Confidence against accuracy of the global model after the first rounds."""

    name = "confidence"
    after = "init"

    images: int = schema.at_least(2, default=1000, meaning="test images at most")

    def needs(self, study: Any) -> tuple[str, ...]:
        """The global model."""
        del study
        return ("global_model",)

    def run(self, context: Context, global_model: ModelState) -> Run:
        """Compare the two."""
        yield from ()  # one that trains yields its loops, see mosaic_jax.core.steps
        test = context.held_out["test"]
        label = np.asarray(test.label[: self.images])
        logits = evaluation.predict(
            lambda image: context.classifier.logits(global_model, image),
            test.image[: self.images],
            batch_size=context.settings.evaluation.batch_size,
        )
        probability = np.asarray(jax.nn.softmax(logits))
        sure, right = probability.max(axis=1), probability.argmax(axis=1) == label
        excess = sure - right
        mean, error = excess.mean(), excess.std() / np.sqrt(len(excess))
        number = {
            "mean": float(mean),
            "low": float(mean - 1.96 * error),
            "high": float(mean + 1.96 * error),
            "meaning": MEANING,
        }
        return Outcome(
            artifacts={},
            headline={"overconfidence": number},
            section=_section(label, sure, right),
        )


def _section(
    label: np.ndarray, sure: np.ndarray, right: np.ndarray
) -> sections.Section:
    rows: list[Sequence[str]] = [
        (str(k), f"{sure[label == k].mean():.3f}", f"{right[label == k].mean():.3f}")
        for k in np.unique(label)
    ]
    head = ("class", "confidence", "accuracy")
    table = sections.Table(head, rows, "Of the global model after the first rounds.")
    return sections.Section("Confidence", [table])
