"""What `mosaic run` does once its flags are parsed."""

import dataclasses
import logging
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mosaic_jax import report
from mosaic_jax.core import errors, files
from mosaic_jax.report import comparison, runs
from mosaic_jax.run import (
    environment,
    estimate,
    fairness,
    methods,
    processes,
    programs,
    runner,
    settings,
    summary,
    tracking,
)
from mosaic_jax.run import study as studied
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.summary import OverSeeds, Summary

_log = logging.getLogger(__name__)


def run(
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    reuse_from: Sequence[str] = (),
    command: Sequence[str] = (),
    of_processes: tuple[str, int, int] = ("", 1, 0),
    dry_run: bool = False,
) -> int:
    """Run a study, of one or more seeds, or a comparison of several methods.

    Args:
      config: nested settings.
      workdir: run directory.
      reuse_from: run directories whose finished stages may be used.
      command: by which the study was started, for the records.
      of_processes: the arguments of `processes.join`.
      dry_run: only tell what the study would cost.

    Returns:
      The exit code: 0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    prepare()

    def program() -> None:
        processes.join(*of_processes)
        with processes.fail_together():
            study = settings.from_mapping(config)
            # What each does next depends on it.
            processes.agree({"command": {"--dry_run": dry_run}})
            if dry_run:
                _estimate(study, workdir, reuse_from)
            elif study.compare:
                _compare(study, workdir, reuse_from, command)
            else:
                works = studies(study, workdir, reuse_from, command)
                agree(works, workdir)
                _finish(*_run_all(works, workdir), workdir)

    return programs.exit_code(program)


def agree(works: Sequence[Experiment], workdir: pathlib.Path) -> None:
    """Check, before any training, that all processes are about to do the same.

    Raises:
      ConfigError: settings, code, data, plan or the run directory differ.
    """
    if not processes.several():
        return
    facts = runner.facts(works)
    sees = {"sees in --workdir what process 0 writes": _is_shared(workdir)}
    processes.agree({**facts, "run directory": sees})


def _is_shared(workdir: pathlib.Path) -> bool:
    """Whether `workdir` is the folder that the first process has under this name."""
    token, path = processes.exchange(str(uuid.uuid4()))[0], workdir / ".shared"
    if environment.is_primary():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, token.encode())
    processes.exchange("it is written")
    return path.exists() and path.read_text() == token


def studies(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str | pathlib.Path] = (),
    command: Sequence[str] = (),
) -> list[Experiment]:
    """One of each seed. All are made before the first runs: errors show at once.

    Args:
      study: settings.
      workdir: run directory; of several seeds each has a folder `seed_N` in it.
      reuse_from: run directories whose finished stages may be used.
      command: by which the study was started, for the records.

    Raises:
      ConfigError: `workdir` holds something else, or the study contradicts itself.
      DataError: the data are missing or cannot be split.
    """
    files.check_folder("--workdir", workdir)
    _check_seeds(workdir, study.seeds)
    folders = {study.seed: workdir}
    if study.seeds > 1:
        seeds = range(study.seed, study.seed + study.seeds)
        folders = {seed: workdir / f"seed_{seed}" for seed in seeds}
    return [
        Experiment(
            dataclasses.replace(study, seed=seed, seeds=1),
            folder,
            reuse_from=_same_seed(reuse_from, seed),
            command=command,
        )
        for seed, folder in folders.items()
    ]


def _compare(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str],
    command: Sequence[str],
) -> None:
    """Methods one after the other, in folders of `workdir`; stages are shared."""
    works = _studies_by_method(study, workdir, reuse_from, command)
    agree([work for group in works.values() for work in group], workdir)
    fair = fairness.check_fair(works)
    # Mosaic's first stage keeps the clients' models and so serves the others too.
    for name in sorted(works, key=lambda name: not name.startswith("mosaic")):
        _log.info("method %s", name)
        run_sharing(works, name, workdir)
    if environment.is_primary():
        recorded = fairness.check_recorded(works)
        terms = {seed: fair[seed] | recorded[seed] for seed in fair}
        content = {"order": list(works), "equal_terms": terms}
        files.write_json(workdir / "comparison.json", content)
        path = workdir / "comparison.html"
        title = f"{len(works)} methods on {study.data.name}"
        groups = runs.collect([workdir])
        rows = comparison.write(groups, path, title=title, terms=terms)
        files.write_json(workdir / "comparison.json", content | {"methods": rows})
        print(comparison.table(rows))
        print(workdir / "comparison.json")
        print(path)


def _estimate(
    study: Settings, workdir: pathlib.Path, reuse_from: Sequence[str]
) -> None:
    """Print what a study, each method of a comparison, would cost.

    All are made and checked before the first is tried, which takes minutes.
    """
    if study.compare:
        works = _studies_by_method(study, workdir, reuse_from)
        fairness.check_fair(works)
    else:
        works = {"": studies(study, workdir, reuse_from)}
    done = {name: seeds[0].finished() for name, seeds in works.items()}
    for name, seeds in works.items():
        if name:
            print(f"\n{name}")
        costs = estimate.estimate(seeds[0])
        print(estimate.table(costs, seeds[0].study.num_parameters))
        if done[name]:
            print(f"finished already: {', '.join(one.name for one in done[name])}")
        if len(seeds) > 1:
            print(f"for each of {len(seeds)} seeds")


def _studies_by_method(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str],
    command: Sequence[str] = (),
) -> dict[str, list[Experiment]]:
    """The studies of each method of a comparison, one per seed."""
    return {
        name: studies(study_of_method(study, name), workdir / name, reuse_from, command)
        for name in _compared(study)
    }


def _compared(study: Settings) -> Sequence[str]:
    """The methods of `compare`: of a list's name, or names with commas."""
    if not study.compare:
        return ()
    return methods.LISTS.get(study.compare) or study.compare.split(",")


def study_of_method(study: Settings, name: str) -> Settings:
    """The study of one method of a comparison.

    Fields of components that only the others use are left out: they would be unknown.
    """
    alone = dataclasses.replace(study, compare="")
    of_each = {one: methods.with_method(alone, one) for one in _compared(study)}
    groups = {one: studied.components(of_each[one]).keys() for one in of_each}
    others = set().union(*groups.values()) - groups[name]
    kept = {k: fields for k, fields in study.methods.items() if k not in others}
    return dataclasses.replace(of_each[name], methods=kept)


def run_sharing(
    works: Mapping[str, Sequence[Experiment]], name: str, workdir: pathlib.Path
) -> None:
    """Run the study `name`, of one or more seeds; stages of all others may be used.

    Args:
      works: the studies by name, one per seed each.
      name: of that to run.
      workdir: the studies lie in folders of it by their names.
    """
    for others in works.values():
        for work, other in zip(works[name], others, strict=True):
            work.reuse(other.workdir)
    _run_all(works[name], workdir / name)


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


def _run_all(
    works: Sequence[Experiment], workdir: pathlib.Path
) -> tuple[Summary | OverSeeds, list[pathlib.Path]]:
    """As many together as have room; the summary over all, and their reports."""
    summaries: list[Summary] = []
    pages: list[pathlib.Path] = []
    at_once = works[0].seeds_at_once if len(works) > 1 else 1
    for first in range(0, len(works), at_once):
        group = works[first : first + at_once]
        summaries += runner.run_together(group)
        if environment.is_primary():
            pages += [report.write(work.workdir) for work in group]
    if len(works) == 1:
        return summaries[0], pages
    over_seeds = summary.over_seeds(summaries)
    if environment.is_primary():
        summary.write(workdir / "summary.json", over_seeds)
    return over_seeds, pages


def _finish(
    found: Summary | OverSeeds, pages: Sequence[pathlib.Path], workdir: pathlib.Path
) -> None:
    if environment.is_primary():
        print_summary(found)
        print(f"summary  {workdir / 'summary.json'}")
        for page in pages:
            print(f"report   {page}")


def print_summary(found: Summary | OverSeeds) -> None:
    """Table of accuracies on stdout, over several seeds with their spread."""
    sets = {"test": found.test_accuracy, "validation": found.validation_accuracy}
    sets = {name: accuracy for name, accuracy in sets.items() if accuracy}
    width = 12 if isinstance(found, Summary) else 18
    print(f"{'accuracy':<16}" + "".join(f"{name:>{width}}" for name in sets))
    for model in found.test_accuracy:
        shown = [_shown(accuracy.get(model)) for accuracy in sets.values()]
        print(f"{model:<16}" + "".join(f"{value:>{width}}" for value in shown))


def _shown(value: float | Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return f"{value['mean']:.4f} ± {value['spread']:.4f}"
    return f"{value:.4f}"


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        path = pathlib.Path(cache) / "mosaic_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(path))
    # The small ones too: by default programs that compile within a second are left out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
