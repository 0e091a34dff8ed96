"""What a stage is: settings and artifacts in, artifacts and results out."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mosaic_jax import evaluation, settings
from mosaic_jax.classifier import Classifier
from mosaic_jax.data.federated import StudyData
from mosaic_jax.loop import Loop
from mosaic_jax.types import Array, ModelState, Tree


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage may read; `key` is the stage's own."""

    settings: settings.Settings
    data: StudyData
    classifier: Classifier
    key: Array
    loop: Loop


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage hands on.

    Attributes:
      artifacts: name to pytree.
      results: JSON-able findings for summary and report.
      up: bytes that clients sent to the server, by payload.
      down: bytes that the server sent to clients, by payload.
    """

    artifacts: dict[str, Tree]
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    up: dict[str, int] = dataclasses.field(default_factory=dict)
    down: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One link of the chain.

    Attributes:
      name: of the stage; its random stream has the same name.
      needs: artifacts that `run` takes by keyword.
      provides: artifacts that it returns.
      depends: the settings that the result depends on, JSON-able.
      run: `run(context, **artifacts)`.
    """

    name: str
    needs: tuple[str, ...]
    provides: tuple[str, ...]
    depends: dict[str, Any]
    run: Callable[..., Outcome]


def model_metrics(context: Context, model: ModelState) -> dict[str, Array]:
    """Accuracy of `model` on the test set and, where held out, on validation images."""
    return logits_metrics(context, lambda x: context.classifier.logits(model, x))


def logits_metrics(
    context: Context, function: Callable[[Array], Array]
) -> dict[str, Array]:
    """Accuracy of logits computed by `function` from signed images."""
    sets = {"test_accuracy": context.data.test}
    if context.data.validation is not None:
        sets["validation_accuracy"] = context.data.validation
    size = context.settings.evaluation.batch_size
    return {
        name: evaluation.accuracy(
            evaluation.predict(function, images.image, batch_size=size), images.label
        )
        for name, images in sets.items()
    }


def predictions(context: Context, function: Callable[[Array], Array]) -> list[int]:
    """Predicted classes of the test images."""
    size = context.settings.evaluation.batch_size
    logits = evaluation.predict(function, context.data.test.image, batch_size=size)
    return logits.argmax(axis=-1).tolist()
