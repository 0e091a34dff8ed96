"""What a user's code may do while a study runs: watch, log, end a stage of rounds."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mosaic_jax.core import errors, provenance, schema
from mosaic_jax.core.steps import ROUND
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.run.store import Record


@dataclasses.dataclass(frozen=True)
class Round:
    """What is known after federated rounds.

    Attributes:
      stage: name of the stage.
      number: of rounds of the stage so far.
      of: number of rounds that the stage has.
      metrics: after the last round, by name; those that have just been measured.
      history: metrics of the stage so far, oldest first, each with "step", the number
        of rounds before it; the last is `metrics`.
      state: of the rounds, on the devices; to be read, not kept: the next rounds reuse
        its memory.
    """

    stage: str
    number: int
    of: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    state: Tree

    @property
    def model(self) -> ModelState | None:
        """The global model; None where clients exchange no models."""
        first = self.state[0] if isinstance(self.state, tuple) else self.state
        found = getattr(first, "model", None)
        return found if isinstance(found, ModelState) else None


class Callback:
    """Base of a user's callbacks; each method does nothing unless overridden.

    One that may end a stage is a frozen dataclass: its code and fields are then part of
    the fingerprints of the stages that it may end, as it changes their results.
    """

    def may_stop(self, stage: str) -> bool:
        """Whether `on_round_end` may end the stage of that name."""
        del stage
        return False

    def on_stage_start(self, stage: str) -> None:
        """Before a stage runs; not called for one that is reused."""

    def on_stage_end(self, stage: str, record: Record) -> None:
        """After a stage ran: `record` has its results, metrics and time."""

    def on_round_end(self, state: Round) -> bool | None:
        """After `evaluation.every` rounds, when models were measured.

        A run that goes on from a checkpoint calls it again for the last round before.

        Returns:
          True to end the stage with the model that it has; an error where `may_stop`
          does not say so.
        """

    # What trackers need. Of several processes, only the first calls these.

    def on_study_start(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        """Before any stage, whenever a run begins or goes on.

        Args:
          workdir: run directory.
          settings: of the study by dotted name.
        """

    def on_record(
        self, stage: str, loop: str, step: int, metrics: Mapping[str, float]
    ) -> None:
        """Whenever a loop, of rounds or of other steps, has measured something.

        Args:
          stage: name of the stage.
          loop: name of the loop in it.
          step: number of steps that it has done.
          metrics: since the last record, by name.
        """

    def on_pictures(self, stage: str, pictures: Mapping[str, np.ndarray]) -> None:
        """After a stage made pictures, by name: each uint8 [H, W, 3]."""

    def on_parameters(
        self, stage: str, model: str, parameters: Mapping[str, Array]
    ) -> None:
        """After a stage made a model.

        Args:
          stage: name of the stage.
          model: name of the model.
          parameters: of the model by name.
        """

    def on_study_end(self, results: Mapping[str, float]) -> None:
        """When a run ends.

        Args:
          results: test accuracy of each model, "test/NAME"; {}: it ended early.
        """


@dataclasses.dataclass(frozen=True)
class EarlyStopping(Callback):
    """Ends a stage of rounds whose model no longer gets better.

    Attributes:
      metric: of the rounds; greater is better, but for "loss".
      patience: measurements in a row without a gain.
      min_gain: what counts as one.
      stages: that may be ended.
    """

    metric: str = "validation_accuracy"
    patience: int = schema.at_least(1, default=5)
    min_gain: float = schema.at_least(0, default=0.0)
    stages: tuple[str, ...] = ("init", "warmup", "finetune")

    def may_stop(self, stage: str) -> bool:
        """In its `stages`."""
        return stage in self.stages

    def on_round_end(self, state: Round) -> bool:
        """Whether the best value is `patience` measurements old.

        Raises:
          ConfigError: nothing is measured under this name.
        """
        if self.metric not in state.metrics:
            raise errors.ConfigError(
                f"EarlyStopping.metric = {self.metric!r}:"
                f" {schema.near(self.metric, list(state.metrics))}"
            )
        sign = -1 if self.metric == "loss" else 1
        best, waited = -float("inf"), 0
        for row in state.history:
            value = sign * row[self.metric]
            waited = 0 if value > best + self.min_gain else waited + 1
            best = value if waited == 0 else best
        return waited >= self.patience


def check(
    callbacks: Sequence[Any],
    stages: Sequence[str],
    *,
    parts: bool,
    held_out: Collection[str],
) -> tuple[Callback, ...]:
    """`callbacks`, if they can be called in a study.

    Args:
      callbacks: of the user.
      stages: names of the study's stages.
      parts: whether clients hold parts of the network.
      held_out: names of the sets of images that models are measured on.

    Raises:
      ConfigError: one is no `Callback`, or may end a stage and is no frozen dataclass,
        or a stage whose last round must be known before, or waits for the accuracy on
        images that there are none of.
    """
    if isinstance(callbacks, Callback):
        raise errors.ConfigError(
            f"callbacks: {type(callbacks).__name__}: must be a list of callbacks"
        )
    for one in callbacks:
        if not isinstance(one, Callback):
            raise errors.ConfigError(
                f"callbacks: {one!r}: must be instances of mosaic_jax.Callback"
            )
        if any(map(one.may_stop, stages)):
            if not schema.is_component(type(one)):
                raise errors.ConfigError(
                    f"callbacks: {type(one).__name__}: must be a frozen dataclass, as"
                    " it may end a stage"
                )
            schema.check(type(one), vars(one), type(one).__name__)
            metric = one.metric if isinstance(one, EarlyStopping) else ""
            known = [f"{name}_accuracy" for name in held_out]
            if metric.endswith("_accuracy") and metric not in known:
                instead = schema.near(metric, ["loss", *known])
                if metric == "validation_accuracy":
                    instead = "must be another, or data.validation > 0"
                raise errors.ConfigError(
                    f"{type(one).__name__}.metric = {metric!r}: {instead}"
                )
        # Generators have the parts that their clients hold in the last of the rounds.
        if parts and "generators" in stages and one.may_stop("init"):
            raise errors.ConfigError(
                f"callbacks: {type(one).__name__}: must not end stage 'init' where"
                " clients hold parts of the network and train generators after it"
            )
    return tuple(callbacks)


def in_fingerprint(callbacks: Sequence[Callback], stage: str) -> list[Any]:
    """Those that may end `stage`, as they count in its fingerprint."""
    return [provenance.description(one) for one in callbacks if one.may_stop(stage)]


def told(callbacks: Sequence[Callback], event: str, *given: Any) -> None:
    """Call a method of every callback.

    Args:
      callbacks: in their order.
      event: name of the method.
      given: its arguments; errors name the first if it is text, the stage.

    Raises:
      MosaicError: one of them raised something.
    """
    where = [event, *(one for one in given[:1] if isinstance(one, str))]
    for one in callbacks:
        with _named(one, ", ".join(where)):
            getattr(one, event)(*given)


def waits_for_rounds(callback: Callback) -> bool:
    """Whether it is called between rounds, which then are measured one by one."""
    return type(callback).on_round_end is not Callback.on_round_end


def stops(
    callbacks: Sequence[Callback], loop: str, make_round: Callable[[], Round]
) -> bool:
    """Call `on_round_end` of every callback, if these were rounds.

    Args:
      callbacks: in their order.
      loop: name of the loop.
      make_round: what they are given.

    Returns:
      Whether one ends the stage.

    Raises:
      MosaicError: one of them raised something, or ends a stage unannounced.
    """
    if not callbacks or loop != ROUND:
        return False
    state, result = make_round(), False
    for one in callbacks:
        with _named(one, f"on_round_end, {state.stage}, round {state.number}"):
            wants = bool(one.on_round_end(state))
            if wants and not one.may_stop(state.stage):
                raise errors.ConfigError(
                    f"ends the stage: may_stop({state.stage!r}) must be True"
                )
        result |= wants
    return result


@contextlib.contextmanager
def _named(callback: Callback, where: str) -> Iterator[None]:
    """Errors say in which callback they are."""
    name = f"callback {type(callback).__name__}.{where}"
    try:
        yield
    except errors.MosaicError as error:
        error.args = (f"{name}: {error}",)
        raise
    except Exception as error:  # whatever the user's code raises
        raise errors.MosaicError(
            f"{name}: {type(error).__name__}: {errors.reason(error)}"
        ) from error
