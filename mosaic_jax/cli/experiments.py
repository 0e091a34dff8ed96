"""The study of one or more seeds: made, agreed on by all processes, run."""

import dataclasses
import logging
import pathlib
import uuid
from collections.abc import Callable, Sequence

from mosaic_jax import report
from mosaic_jax.cli import telling
from mosaic_jax.core import errors, files
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.settings import Data
from mosaic_jax.run import environment, processes, runner, summary
from mosaic_jax.run.mirror import Mirror
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.summary import OverSeeds, Summary

_log = logging.getLogger(__name__)

# Data of a seed that take the place of those that the settings name; None: none do.
DataOf = Callable[[Data, int], StudyData | None]


def as_named(config: Data, seed: int) -> None:
    """The data that the settings name: none take their place."""
    del config, seed


def make(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str | pathlib.Path] = (),
    command: Sequence[str] = (),
    data: DataOf = as_named,
    mirror: Mirror | None = None,
) -> list[Experiment]:
    """One of each seed. All are made before the first runs: errors show at once.

    Args:
      study: settings.
      workdir: run directory; of several seeds each has a folder `seed_N` in it.
      reuse_from: run directories whose finished stages may be used.
      command: by which the study was started, for the records.
      data: makes the data of a seed; None from it: those that the settings name.
      mirror: keeps a copy of `workdir`; None: none does.

    Raises:
      ConfigError: `workdir` holds something else, or the study contradicts itself.
      DataError: the data are missing or cannot be split.
    """
    files.check_folder("--workdir", workdir)
    _check_seeds(workdir, study.seeds)
    return [
        Experiment(
            one,
            folder,
            reuse_from=_same_seed(reuse_from, one.seed),
            command=command,
            data=data(one.data, one.seed),
            mirror=mirror,
        )
        for folder, one in of_seeds(study, workdir).items()
    ]


def of_seeds(study: Settings, workdir: pathlib.Path) -> dict[pathlib.Path, Settings]:
    """The settings of each seed, by its run directory.

    Args:
      study: settings.
      workdir: of the study; of several seeds each has a folder `seed_N` in it.
    """
    alone = {
        seed: dataclasses.replace(study, seed=seed, seeds=1)
        for seed in range(study.seed, study.seed + study.seeds)
    }
    if study.seeds == 1:
        return {workdir: alone[study.seed]}
    return {workdir / f"seed_{seed}": one for seed, one in alone.items()}


def _check_seeds(workdir: pathlib.Path, seeds: int) -> None:
    """One seed's files lie in `workdir`, those of several in folders of it."""
    if seeds > 1 and (workdir / "config.json").exists():
        raise errors.ConfigError(
            f"--workdir = {workdir}: holds a study of one seed: must be another folder"
            f" for seeds = {seeds}"
        )
    if seeds == 1 and any(workdir.glob("seed_*/config.json")):
        raise errors.ConfigError(
            f"--workdir = {workdir}: holds studies of several seeds: must be another"
            " folder for seeds = 1"
        )


def _same_seed(folders: Sequence[str | pathlib.Path], seed: int) -> list[pathlib.Path]:
    """Of a run of several seeds, the folder of `seed`."""
    paths = [pathlib.Path(folder) for folder in folders]
    return [
        path / f"seed_{seed}" if any(path.glob("seed_*")) else path for path in paths
    ]


def agree(
    works: Sequence[Experiment], workdir: pathlib.Path, *, shared: bool = True
) -> None:
    """Check, before any training, that all processes are about to do the same.

    Args:
      works: the study of each seed.
      workdir: run directory.
      shared: whether it must be one folder; else each process has its own.

    Raises:
      ConfigError: settings, code, data, plan or the run directory differ.
    """
    if not processes.several():
        return
    facts = runner.facts(works)
    if shared:
        sees = {"sees in --workdir what process 0 writes": _is_shared(workdir)}
        facts = {**facts, "run directory": sees}
    processes.agree(facts)


def _is_shared(workdir: pathlib.Path) -> bool:
    """Whether `workdir` is the folder that the first process has under this name."""
    token, path = processes.exchange(str(uuid.uuid4()))[0], workdir / ".shared"
    if environment.is_primary():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, token.encode())
    processes.exchange("it is written")
    return path.exists() and path.read_text() == token


def run(
    works: Sequence[Experiment], workdir: pathlib.Path
) -> tuple[Summary | OverSeeds, list[pathlib.Path]]:
    """Run a study, as many of its seeds together as have room.

    Args:
      works: the study of each seed.
      workdir: run directory.

    Returns:
      The summary, over all seeds where there are several, and the pages of each.
    """
    telling.opening(works, workdir)
    summaries: list[Summary] = []
    pages: list[pathlib.Path] = []
    at_once = works[0].seeds_at_once if len(works) > 1 else 1
    for first in range(0, len(works), at_once):
        group = works[first : first + at_once]
        summaries += runner.run_together(group)
        if environment.is_primary():
            _log.info("drawing the report")
            pages += [report.write(work.workdir) for work in group]
    if len(works) == 1:
        return summaries[0], pages
    over_seeds = summary.over_seeds(summaries)
    if environment.is_primary():
        summary.write(workdir / "summary.json", over_seeds)
    return over_seeds, pages
