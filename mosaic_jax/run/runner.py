"""Studies in run directories: their stages run, resumed or reused, in order.

Each study is an `Experiment`. Studies that differ in their seed only run side by side:
loops that they reach at the same time run as one program.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterator, Sequence

from mosaic_jax.core import errors, provenance, schema
from mosaic_jax.core.errors import Interrupted
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Tree
from mosaic_jax.data import federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.fl import parallel
from mosaic_jax.run import callbacks as called
from mosaic_jax.run import (
    config_file,
    environment,
    memory,
    processes,
    pulse,
    start,
    store,
    trackers,
    tracking,
)
from mosaic_jax.run import study as studies
from mosaic_jax.run.callbacks import Callback
from mosaic_jax.run.interruption import Interruption
from mosaic_jax.run.loop import run_stage
from mosaic_jax.run.mirror import Mirror
from mosaic_jax.run.placement import Placement
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.stopwatch import Stopwatch
from mosaic_jax.run.store import FinishedStage
from mosaic_jax.run.study import Planned
from mosaic_jax.run.study_run import StudyRun
from mosaic_jax.run.summary import Summary
from mosaic_jax.stages.base import Link

_log = logging.getLogger(__name__)


class Experiment:
    """One study in one run directory."""

    def __init__(
        self,
        settings: Settings,
        workdir: str | pathlib.Path,
        *,
        reuse_from: Sequence[str | pathlib.Path] = (),
        command: Sequence[str] = (),
        data: StudyData | None = None,
        callbacks: Sequence[Callback] = (),
        mirror: Mirror | None = None,
    ) -> None:
        """Build the study, and check all that can be checked before it runs.

        Args:
          settings: of the study.
          workdir: run directory; it is created when the study runs.
          reuse_from: run directories whose finished stages may be reused.
          command: the command line that started the study, for the records.
          data: images and split, in place of those that the settings name.
          callbacks: a user's code that is called while the study runs.
          mirror: keeps a copy of `workdir`, or of a folder around it; None: none does.

        Raises:
          ConfigError: a name is not known, settings contradict each other, or
            `workdir` holds another study.
          DataError: the data are missing or cannot be split.
        """
        self.workdir = pathlib.Path(workdir)
        self.reuse_from = [pathlib.Path(path) for path in reuse_from]
        for path in self.reuse_from:
            if not (path / "stages").is_dir():
                raise errors.ConfigError(f"--reuse_from = {path}: no run directory")
        config_file.check_same_study(self.workdir, settings)
        places = [self.workdir, *([mirror.url] if mirror else [])]
        if any(start.is_of_run(settings.model.start, place) for place in places):
            raise errors.ConfigError(
                f"model.start = {settings.model.start!r}: must be another run than"
                f" --workdir = {self.workdir}, which it would change"
            )
        named = trackers.named(settings.log.trackers)
        self.study = studies.build(settings, data, (*named, *callbacks))
        known = [link.name for link in self.study.chain]
        if settings.profile and settings.profile not in known:
            raise errors.ConfigError(
                f"profile = {settings.profile!r}:"
                f" {schema.near(settings.profile, known)}"
            )
        devices = parallel.first_devices(settings.compute.devices)
        if settings.compute.seeds_at_once > 1 < len(devices):
            raise errors.ConfigError(
                f"compute.seeds_at_once = {settings.compute.seeds_at_once}: must be"
                f" <= 1 on {len(devices)} devices, which each seed uses in its own way"
            )
        self._command, self._mirror = list(command), mirror

    @property
    def settings(self) -> Settings:
        """Settings of the study."""
        return self.study.settings

    @property
    def data(self) -> StudyData:
        """Images of the study and their split, in host memory."""
        return self.study.data

    @property
    def seeds_at_once(self) -> int:
        """Number of seeds of this study that run together, by settings and memory."""
        return memory.seeds_at_once(self.study)

    @property
    def writes(self) -> bool:
        """Whether this process changes files in the run directory.

        Of several that share it, the first does; where each has its own, all do.
        """
        return environment.is_primary() or self._mirror is not None

    def saved(self) -> None:
        """Have what was saved copied, see `Mirror.saved`; all processes call this."""
        if self._mirror is not None:
            self._mirror.saved()

    def plan(self) -> list[Planned]:
        """The stages with their fingerprints, see `Study.plan`."""
        return self.study.plan()

    def run(self) -> Summary:
        """Run, resume or load every stage, see `run_together`; returns the summary."""
        return run_together([self])[0]

    def reuse(self, workdir: pathlib.Path) -> None:
        """Allow the finished stages of another run directory to be reused."""
        if workdir != self.workdir:
            self.reuse_from.append(workdir)

    def finished(self) -> list[FinishedStage]:
        """The finished stages in order, up to the first that is not finished."""
        result = []
        for planned in self.plan():
            stage = self.find(self.workdir, planned)
            if stage is None:
                break
            result.append(stage)
        return result

    def reusable(self) -> list[str]:
        """Names of the stages that are finished in another run directory."""
        return [
            planned[0].name
            for planned in self.plan()
            if any(self.find(root, planned) for root in self.reuse_from)
        ]

    def start(self, link: Link, artifacts: dict[str, Tree]) -> Run:
        """Start the stage of `link` on those of `artifacts` that it needs."""
        needed = {name: artifacts[name] for name in link.needs(self.settings)}
        return link.run(self.placement.context(link), needed)

    @functools.cached_property
    def placement(self) -> Placement:
        """The study on the devices; these are not used if every stage is finished."""
        return Placement(self.study)

    @contextlib.contextmanager
    def opened(self) -> Iterator[StudyRun]:
        """Create and lock the run directory, and write what is known from the start."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        with environment.locked(self.workdir):
            if environment.is_primary():
                config_file.write(self.workdir, self.settings, self._command)
                federated.save_split(self.workdir / "split.json", self.data)
            environment.wait_for_all("start")
            tracker = tracking.Tracker(
                self.workdir,
                callbacks=self.study.callbacks,
                settings=schema.flat(self.settings),
                writes=environment.is_primary(),
            )
            with contextlib.closing(tracker):
                yield StudyRun(self, tracker)

    def find(self, root: pathlib.Path, planned: Planned) -> FinishedStage | None:
        """The finished stage in run directory `root`, None if it is not there."""
        link, fingerprint = planned
        identity = self.study.identity(link, fingerprint)
        return store.find(root, identity, link.provides(self.settings))


def run_together(experiments: Sequence[Experiment]) -> list[Summary]:
    """Run, resume or load every stage of studies that differ in their seed only.

    Their stages run side by side, batched over seeds where their loops are alike.

    Returns:
      The summary of each study.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      DivergedError: a metric or a parameter is not finite.
    """
    _make_alike(experiments)
    plans = [experiment.plan() for experiment in experiments]
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        runs = [stack.enter_context(each.opened()) for each in experiments]
        progress = stack.enter_context(_progress(experiments))
        for stages in zip(*plans, strict=True):
            missing = [
                (run, planned)
                for run, planned in zip(runs, stages, strict=True)
                if not run.load(planned)
            ]
            if missing and any(signum := environment.highest(interruption.signum)):
                raise Interrupted(*signum)
            if missing:
                _compute(missing, progress, interruption)
            progress.finished(stages[0][0].name, reused=not missing)
        for run in runs:
            accuracy = run.summary.test_accuracy
            run.tracker.results({f"test/{n}": value for n, value in accuracy.items()})
    return [run.summary for run in runs]


def _compute(
    missing: Sequence[tuple[StudyRun, Planned]],
    progress: tracking.Progress,
    interruption: Interruption,
) -> None:
    """Run one stage of each study; its time is divided evenly among them."""
    name = missing[0][1][0].name
    _log.info("%s: running", name)
    progress.enter(name)
    for run, _ in missing:
        called.told(run.study.callbacks, "on_stage_start", name)
    with Stopwatch() as watch:
        share = 1 / len(missing)
        loops = [
            run.loop(planned, progress, interruption, watch, share=share)
            for run, planned in missing
        ]
        started = [
            run.experiment.start(planned[0], run.artifacts) for run, planned in missing
        ]
        # Several studies run together on one device alone.
        with missing[0][0].experiment.placement.axis.sharing():
            outcomes = run_stage(loops, started)
        spent = [loop.time_sheet.spent() for loop in loops]
    _log.info("%s: done in %.1f s", name, sum(watch.spent().values()))
    for (run, planned), outcome, seconds in zip(missing, outcomes, spent, strict=True):
        record = run.save(planned, outcome, seconds)
        called.told(run.study.callbacks, "on_stage_end", name, record)
    missing[0][0].experiment.saved()


@contextlib.contextmanager
def _progress(experiments: Sequence[Experiment]) -> Iterator[tracking.Progress]:
    """The progress of studies that run together; it records if they end early."""
    count, flops = len(experiments), experiments[0].study.flops
    progress = tracking.Progress(
        [experiment.workdir for experiment in experiments],
        {name: count * value for name, value in flops.items()},
        writes=environment.is_primary(),
    )
    try:
        with pulse.Pulse(progress.alive):
            yield progress
    except Interrupted:
        progress.stopped("interrupted")
        raise
    except errors.MosaicError as error:
        progress.stopped("failed", str(error))
        raise
    except BaseException as error:  # a user's hook that exits, no memory, a fault
        progress.stopped("failed", f"{type(error).__name__}: {errors.reason(error)}")
        raise


def _make_alike(experiments: Sequence[Experiment]) -> None:
    """Pad the clients' index rows to one length, so that all loops have one shape."""
    length = max(each.data.clients.client.index.shape[1] for each in experiments)
    for experiment in experiments:
        padded = federated.padded(experiment.data, length)
        experiment.study = dataclasses.replace(experiment.study, data=padded)


def facts(experiments: Sequence[Experiment]) -> processes.Facts:
    """What must be the same in all processes that run these studies.

    The first groups explain a difference best, so they come first.
    """
    # Of the first study: if others differ between processes, so do their plans.
    study = schema.flat(experiments[0].settings)
    # Images and arrays may lie elsewhere on another machine.
    del study["data.dir"], study["model.start"]
    data, plan, done, reused = {}, {}, {}, {}
    for number, experiment in enumerate(experiments):
        name = f"study {number}" if len(experiments) > 1 else "the study"
        data[f"images and split of {name}"] = experiment.data.content_sha256
        plan |= {f"stage {link.name} of {name}": f for link, f in experiment.plan()}
        finished = [stage.name for stage in experiment.finished()]
        done[f"finished stages of {name}"] = finished
        reused[f"stages of {name} found by --reuse_from"] = experiment.reusable()
    code = {"mosaic_jax": provenance.library_digest(), **environment.versions()}
    return {
        "settings": study | {"seeds": len(experiments)},
        "code": code,
        "data": data,
        "plan": plan,
        "run": done | reused,
    }
