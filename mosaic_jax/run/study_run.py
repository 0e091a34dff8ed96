"""A run of one study: stages loaded from disk, or run and saved there."""

import dataclasses
import json
import logging
import pathlib
import shutil
from typing import TYPE_CHECKING

from mosaic_jax.core import errors, trees
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.run import callbacks as called
from mosaic_jax.run import environment, store, summary, tracking
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.running import Loop
from mosaic_jax.run.stopwatch import Stopwatch, TimeSheet
from mosaic_jax.run.store import FinishedStage, Record
from mosaic_jax.run.study import Planned
from mosaic_jax.run.summary import Summary
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import Link, Outcome

if TYPE_CHECKING:
    from mosaic_jax.run.runner import Experiment

_log = logging.getLogger(__name__)

# What every headline number has.
HEADLINE = {"mean", "low", "high", "meaning"}


class StudyRun:
    """A run of one study: the stages that are finished and what they made so far."""

    def __init__(self, experiment: "Experiment", tracker: tracking.Tracker) -> None:
        """No stage is finished yet."""
        self.experiment, self.tracker = experiment, tracker
        self.study = experiment.study
        self.artifacts: dict[str, Tree] = {}
        self.finished: list[FinishedStage] = []
        self.summary: Summary  # of the stages so far, once there is one

    def load(self, planned: Planned) -> bool:
        """Load a stage that is finished here or in another run directory.

        Returns:
          Whether it was loaded. If not, it must run; one that is damaged is removed.
        """
        stage = self._reused(planned)
        if stage is None:
            return False
        try:
            artifacts = stage.artifacts(self.study.template(planned[0]))
        except errors.CheckpointError as error:
            _log.warning("%s; stage %s runs again", error, stage.name)
            environment.wait_for_all(f"{stage.name} damaged")
            if self.experiment.writes:
                shutil.rmtree(stage.directory)
            return False
        self._add(stage, artifacts)
        return True

    def loop(
        self,
        planned: Planned,
        progress: tracking.Progress,
        interruption: Interruption,
        watch: Stopwatch,
        *,
        share: float,
    ) -> Loop:
        """What the loops of a stage need to run.

        Args:
          planned: the stage and its fingerprint.
          progress: of the run.
          interruption: of the run.
          watch: measures the time of the stage.
          share: of that time that this study is charged, in (0, 1].
        """
        link, settings = planned[0], self.study.settings
        directory = self._directory(planned)
        directory.mkdir(parents=True, exist_ok=True)
        profiled = settings.profile == link.name
        return Loop(
            stage=link.name,
            seed=settings.seed,
            directory=directory / store.CHECKPOINTS,
            tracker=self.tracker,
            progress=progress,
            interruption=interruption,
            checkpoint_seconds=settings.log.checkpoint_seconds,
            grace_seconds=settings.log.grace_seconds,
            place=self.experiment.placement.axis.replicate,
            identity=self.study.identity(*planned),
            time_sheet=TimeSheet(
                directory / store.TIMES,
                watch,
                identity=self.study.identity(*planned),
                share=share,
                writes=environment.is_primary(),
            ),
            profile=self.experiment.workdir / "profile" if profiled else None,
            callbacks=tuple(filter(called.waits_for_rounds, self.study.callbacks)),
            saved=self.experiment.saved,
        )

    def save(
        self, planned: Planned, outcome: Outcome, spent: dict[str, float]
    ) -> Record:
        """Save what a stage returned; its record.

        Args:
          planned: the stage and its fingerprint.
          outcome: of the stage.
          spent: seconds by kind, see `Stopwatch.spent`.

        Raises:
          MosaicError: it is not what the stage says that it returns.
        """
        link, _ = planned
        _check(outcome, link, self.study.template(link))
        directory = self._directory(planned)
        identity = self.study.identity(*planned)
        store.save_artifacts(directory, identity, outcome.artifacts)
        section = outcome.section
        record = Record(
            identity=identity,
            provides=list(outcome.artifacts),
            models=outcome.models,
            results=outcome.results,
            headline=outcome.headline,
            clients={
                column: {str(client): text for client, text in cells.items()}
                for column, cells in outcome.clients.items()
            },
            section=section and sections.to_json(section),
            up=outcome.up,
            down=outcome.down,
            sent_before=list(outcome.sent_before),
            flops=self.study.flops[link.name] * _share(outcome),
            history=self.tracker.history(link.name),
            seconds=sum(spent.values()),
            time=spent,
            # Of several processes, that of this one.
            peak_memory_bytes=environment.peak_memory(),
            files={},
        )
        if environment.is_primary():
            record = store.seal(directory, record, outcome.pictures)
        elif self.experiment.writes:
            store.remove_passing(directory)
        environment.wait_for_all(f"{link.name} done")
        self.tracker.pictures(link.name, outcome.pictures)
        for name, artifact in outcome.artifacts.items():
            if isinstance(artifact, ModelState):
                params = trees.flatten(artifact.params)
                self.tracker.parameters(link.name, name, params)
        self._add(FinishedStage(link.name, directory, record), outcome.artifacts)
        return record

    def _reused(self, planned: Planned) -> FinishedStage | None:
        """The finished stage; one of another run directory is copied into this one."""
        experiment = self.experiment
        for root in [experiment.workdir, *experiment.reuse_from]:
            stage = experiment.find(root, planned)
            if stage is None:
                continue
            _log.info("%s: reused from %s", stage.name, stage.directory)
            if root != experiment.workdir:
                target = self._directory(planned)
                if self.experiment.writes:
                    store.copy(stage, target)
                stage = dataclasses.replace(stage, directory=target)
            environment.wait_for_all(f"{stage.name} found")
            self.tracker.replace(stage.name, stage.record.history)
            return stage
        return None

    def _add(self, stage: FinishedStage, artifacts: dict[str, Tree]) -> None:
        self.artifacts |= artifacts
        self.finished.append(stage)
        self.summary = summary.build(
            self.study.settings, self.study.data, self.finished, self.study.privacy
        )
        if environment.is_primary():
            summary.write(self.experiment.workdir / "summary.json", self.summary)

    def _directory(self, planned: Planned) -> pathlib.Path:
        link, fingerprint = planned
        return store.directory_of(self.experiment.workdir, link.name, fingerprint)


def _share(outcome: Outcome) -> float:
    """The part of its steps that a stage did, in (0, 1]; < 1 if it was ended early."""
    stopped = outcome.results.get("stopped", {"after": 1, "of": 1})
    return stopped["after"] / stopped["of"]


def _check(outcome: Outcome, link: Link, template: dict[str, Tree]) -> None:
    """Check that a stage returned what it says, before anything of it is saved.

    Raises:
      MosaicError: artifacts or numbers are others, or cannot be saved.
    """
    name = f"stage {link.name!r}"
    if set(outcome.artifacts) != set(template):
        raise errors.MosaicError(
            f"{name}: returned the artifacts {sorted(outcome.artifacts)}: must be those"
            f" that it provides, {sorted(template)}"
        )
    try:
        trees.restore_into(template, trees.flatten(outcome.artifacts))
    except errors.CheckpointError as error:
        raise errors.MosaicError(
            f"{name}: returned something else than its template: {error}"
        ) from error
    for number, value in outcome.headline.items():
        if not set(value) >= HEADLINE:
            raise errors.MosaicError(
                f"{name}: headline {number!r} has {sorted(value)}: must have"
                f" {', '.join(sorted(HEADLINE))}"
            )
    try:
        json.dumps([outcome.results, outcome.models, outcome.headline])
    except TypeError as error:
        raise errors.MosaicError(
            f"{name}: results, models and headline must be what JSON holds: {error}"
        ) from error
