"""What `mosaic run` does once its flags are parsed."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mosaic_jax import report
from mosaic_jax.cli import telling
from mosaic_jax.core import errors, files
from mosaic_jax.core import programs as traced
from mosaic_jax.data.federated import Data, StudyData
from mosaic_jax.fl import parallel
from mosaic_jax.report import comparison, runs
from mosaic_jax.run import (
    devices,
    environment,
    estimate,
    fairness,
    forecast,
    methods,
    processes,
    programs,
    rehearsal,
    runner,
    settings,
    summary,
    tracking,
)
from mosaic_jax.run import mirror as mirrors
from mosaic_jax.run import study as studied
from mosaic_jax.run.devices import Device
from mosaic_jax.run.mirror import Mirror
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.summary import OverSeeds, Summary

_log = logging.getLogger(__name__)

# Seconds that processes may wait for each other, before settings are checked.
_LONGEST = 1e6

# Data of a seed that take the place of those that the settings name; None: none do.
DataOf = Callable[[Data, int], StudyData | None]


def _as_named(config: Data, seed: int) -> None:
    del config, seed


def run(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    reuse_from: Sequence[str] = (),
    command: Sequence[str] = (),
    of_processes: tuple[str, int, int] = ("", 1, 0),
    dry_run: str = "",
    target: str = "",
) -> int:
    """Run a study, of one or more seeds, or a comparison of several methods.

    Args:
      config: nested settings.
      workdir: run directory, or the URL of one in an object store.
      reuse_from: run directories, or URLs, whose finished stages may be used.
      command: by which the study was started, for the records.
      of_processes: the arguments of `processes.join`.
      dry_run: only tell what the study would cost: "count", from the shapes of its
        programs, or "measure", by running a few steps of each loop; "": run it.
      target: with "count", the device to tell it for, see `run.devices`; "": those
        that are here.

    Returns:
      The exit code: 0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    prepare()
    place = str(workdir)

    def program() -> None:
        processes.join(*of_processes, **_time_limits(config))
        with processes.fail_together(), _device(target, dry_run) as device:
            make_devices(config)
            study = settings.from_mapping(config)
            # What each does next depends on it.
            url = place if files.is_url(place) else ""
            told = {"--dry_run": dry_run, "--workdir that is a URL": url}
            processes.agree({"command": told})
            reused = [_local("--reuse_from", one) for one in reuse_from]
            if dry_run:
                folder = _local("--workdir", place, needed=False)
                if dry_run == "measure":
                    _measure(study, folder, reused)
                else:
                    _forecast(study, folder, reused, device or devices.here())
                return
            _check_alone(study, url)
            with mirrors.opened(place) as (folder, mirror):
                if study.compare:
                    _compare(study, folder, reused, command, mirror)
                else:
                    works = studies(study, folder, reused, command, mirror=mirror)
                    agree(works, folder, shared=mirror is None)
                    found, pages = _run_all(works, folder)
                    if environment.is_primary():
                        telling.ending(found, pages, study, folder, command)

    return programs.exit_code(program)


def _local(field: str, place: str, *, needed: bool = True) -> pathlib.Path:
    """A run directory, or a copy of the finished stages of one that a URL names.

    Args:
      field: that holds it, for messages.
      place: folder or URL.
      needed: whether there must be a finished stage.
    """
    if files.is_url(place):
        return mirrors.finished_stages(f"{field} = {place}", place, needed=needed)
    return pathlib.Path(place)


def _check_alone(study: Settings, url: str) -> None:
    """Check that one process alone compares methods in a store: they share stages.

    Raises:
      ConfigError: several do.
    """
    if url and study.compare and processes.several():
        raise errors.ConfigError(
            f"--workdir = {url}: must be a folder that all processes see for compare ="
            f" {study.compare!r}"
        )


def _time_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """How long processes wait for each other, before the settings are checked."""
    group = config.get("compute")
    if not isinstance(group, Mapping):
        return {}
    kinds: dict[str, Any] = {"join_seconds": int, "silent_seconds": int | float}
    found: dict[str, Any] = {name: group.get(name) for name in kinds}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, kinds[name]) and 1 <= value <= _LONGEST
    }


def make_devices(*configs: Mapping[str, Any]) -> None:
    """As many as `compute.devices` asks for, before settings see which there are.

    Args:
      configs: nested settings of the studies that are about to run, not yet checked.
    """
    groups = [config.get("compute") for config in configs]
    asked = [group.get("devices") for group in groups if isinstance(group, Mapping)]
    numbers = [number for number in asked if isinstance(number, int)]
    if numbers and not processes.several():
        parallel.make_devices(max(numbers))


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


def studies(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str | pathlib.Path] = (),
    command: Sequence[str] = (),
    data: DataOf = _as_named,
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
            data=data(study.data, seed),
            mirror=mirror,
        )
        for seed, folder in folders.items()
    ]


def _compare(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    command: Sequence[str],
    mirror: Mirror | None,
) -> None:
    """Methods one after the other, in folders of `workdir`; stages are shared."""
    works = _studies_by_method(study, workdir, reuse_from, command, mirror=mirror)
    agree([work for group in works.values() for work in group], workdir)
    fair = fairness.check_fair(works)
    # Mosaic's first stage keeps the clients' models and so serves the others too.
    failures = {}
    for name in sorted(works, key=lambda name: not name.startswith("mosaic")):
        _log.info("method %s", name)
        if failure := run_sharing(works, name, workdir):
            failures[name] = failure
    works = {name: group for name, group in works.items() if name not in failures}
    if environment.is_primary() and works:
        recorded = fairness.check_recorded(works)
        terms = {seed: fair[seed] | recorded[seed] for seed in fair}
        content = {"order": list(works), "equal_terms": terms, "failed": failures}
        files.write_json(workdir / "comparison.json", content)
        path = workdir / "comparison.html"
        title = f"{len(works)} methods on {study.data.name}"
        groups = runs.collect([workdir])
        _log.info("drawing the comparison")
        rows = comparison.write(groups, path, title=title, terms=terms)
        files.write_json(workdir / "comparison.json", content | {"methods": rows})
        print(comparison.table(rows))
        print(workdir / "comparison.json")
        print(path)
    if failures:
        raise errors.SomeFailed(failures)


@contextlib.contextmanager
def _device(target: str, dry_run: str) -> Iterator[Device | None]:
    """The device that programs are traced for in this context; None: those here.

    Raises:
      ConfigError: it is not known, or the study would be run.
    """
    if not target:
        yield None
        return
    if dry_run != "count":
        raise errors.ConfigError(f"--target = {target}: must come with --dry_run")
    device = devices.find(target)
    with traced.traced_for(devices.target(device)):
        yield device


def _forecast(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    device: Device | None,
) -> None:
    """Print what a study, each method of a comparison, would cost, by its shapes.

    Args:
      study: settings.
      workdir: run directory; nothing is written there.
      reuse_from: run directories whose finished stages may be used.
      device: that programs are traced for; None: those that are here.
    """
    if traced.target() is not None:
        # It is told for one device: those of this machine say nothing of the target's.
        compute = dataclasses.replace(study.compute, devices=1)
        study = dataclasses.replace(study, compute=compute)
        # What is finished here is no part of a study that runs elsewhere.
        workdir = workdir / "elsewhere"

    def tell(work: Experiment) -> None:
        print(forecast.table(forecast.forecast(work.study, device), work.study, device))

    made_up = functools.cache(rehearsal.made_up)
    if made_up(study.data, study.seed) is not None:
        print(
            f"{study.data.name} is not prepared in {study.data.dir}: labels are made"
            " up, balanced and split as configured"
        )
    _tell_each(study, workdir, reuse_from, tell, made_up)


def _measure(
    study: Settings, workdir: pathlib.Path, reuse_from: Sequence[pathlib.Path]
) -> None:
    """Print what a study, each method of a comparison, would cost, by trying it."""

    def tell(work: Experiment) -> None:
        costs = estimate.estimate(work)
        print(estimate.table(costs, work.study.num_parameters))

    _tell_each(study, workdir, reuse_from, tell)


def _tell_each(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    tell: Callable[[Experiment], None],
    data: DataOf = _as_named,
) -> None:
    """Tell the cost of a study, or of each method of a comparison.

    All are made and checked before the first is told, which may take minutes.

    Args:
      study: settings.
      workdir: run directory; nothing is written there.
      reuse_from: run directories whose finished stages may be used.
      tell: prints the cost of a study.
      data: see `studies`.
    """
    if study.compare:
        works = _studies_by_method(study, workdir, reuse_from, data=data)
        fairness.check_fair(works)
    else:
        works = {"": studies(study, workdir, reuse_from, data=data)}
    done = {name: seeds[0].finished() for name, seeds in works.items()}
    for name, seeds in works.items():
        if name:
            print(f"\n{name}")
        tell(seeds[0])
        if done[name]:
            print(f"finished already: {', '.join(one.name for one in done[name])}")
        if len(seeds) > 1:
            print(f"for each of {len(seeds)} seeds")


def _studies_by_method(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    command: Sequence[str] = (),
    data: DataOf = _as_named,
    mirror: Mirror | None = None,
) -> dict[str, list[Experiment]]:
    """The studies of each method of a comparison, one per seed."""
    return {
        name: studies(
            study_of_method(study, name),
            workdir / name,
            reuse_from,
            command,
            data,
            mirror,
        )
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
) -> str:
    """Run the study `name`, of one or more seeds; stages of all others may be used.

    Args:
      works: the studies by name, one per seed each.
      name: of that to run.
      workdir: the studies lie in folders of it by their names.

    Returns:
      What stopped it, such as divergence or too little memory: the others may go on.
      "": it has finished.
    """
    for others in works.values():
        for work, other in zip(works[name], others, strict=True):
            work.reuse(other.workdir)
    try:
        _run_all(works[name], workdir / name)
    except Exception as error:
        told = [line.removeprefix("error: ") for line in programs.error_lines(error)]
        # Of several processes the others must hear of it, and end; the studies that
        # follow would meet a full disk too.
        if not told or processes.several() or isinstance(error, OSError):
            raise
        failure = "\n".join(told)
        _log.error("%s: %s", name, failure)
        return failure
    return ""


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


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(files.cache() / "xla"))
    # The small ones too: by default programs that compile within a second are left out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
