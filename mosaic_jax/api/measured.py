"""What a user's metrics found of the models of a study, kept in its run directory."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mosaic_jax.api.metrics import Measure
from mosaic_jax.api.model import Model
from mosaic_jax.core import errors, files
from mosaic_jax.data.federated import StudyData
from mosaic_jax.report.runs import FINAL

NAME = "metrics.json"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Metrics of models.

    Attributes:
      models: {model: {set: {metric: value}}}; sets are "test" and "validation".
      clients: {metric: [C] values} of the final model, on each client's test images.
    """

    models: dict[str, dict[str, dict[str, float]]] = dataclasses.field(
        default_factory=dict
    )
    clients: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def measure(data: StudyData, models: Mapping[str, Model], metrics: Measure) -> Measured:
    """Measure models on held-out images.

    Args:
      data: of the study.
      models: by name.
      metrics: of logits and labels.

    Raises:
      ConfigError: a metric does not return a number.
    """
    found = Measured()
    for name, model in models.items():
        found.models[name] = {}
        for held_out, images in data.held_out.items():
            logits, label = model.logits(images.image), np.asarray(images.label)
            found.models[name][held_out] = metrics(logits, label)
            if (name, held_out) == (FINAL, "test"):
                each = [metrics(logits[rows], label[rows]) for rows in data.test_index]
                columns = {metric: [one[metric] for one in each] for metric in each[0]}
                found.clients.update(columns)
    return found


def write(workdir: pathlib.Path, stages: Mapping[str, str], found: Measured) -> None:
    """Keep what was measured.

    Args:
      workdir: run directory.
      stages: fingerprint of each stage that the models come from.
      found: to be kept.
    """
    content = {"stages": dict(stages), **dataclasses.asdict(found)}
    files.write_json(workdir / NAME, content)


def read(workdir: pathlib.Path, stages: Mapping[str, str]) -> Measured:
    """What was measured of the models of these stages; nothing if they are others."""
    try:
        content: dict[str, Any] = files.read_json(workdir / NAME)
    except errors.CheckpointError:  # nothing was measured, or it is damaged
        return Measured()
    if content.pop("stages", None) != stages:
        return Measured()
    return Measured(**content)
