"""What launch.py does once its flags are parsed."""

import copy
import dataclasses
import logging
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mosaic_jax import (
    environment,
    errors,
    estimate,
    experiment,
    fairness,
    files,
    methods,
    processes,
    programs,
    report,
    settings,
    tracking,
)
from mosaic_jax.report import comparison, runs

_log = logging.getLogger(__name__)


def run(
    config: dict[str, Any],
    workdir: pathlib.Path,
    *,
    reuse_from: Sequence[str] = (),
    command: Sequence[str] = (),
    of_processes: tuple[str, int, int] = ("", 1, 0),
    dry_run: bool = False,
) -> int:
    """Run a study; returns the exit code: 0, 2 for a user's error, 128 + signal.

    `of_processes` are the arguments of `processes.join`; a dry run only tells what the
    study would cost.
    """
    prepare()

    def study() -> None:
        processes.join(*of_processes)
        with processes.together():
            compared = settings.from_mapping(config).compare
            if dry_run:
                _estimate(config, compared, workdir, reuse_from)
            elif compared:
                _compare(config, compared, workdir, reuse_from, command)
            else:
                works = studies(config, workdir, reuse_from, command)
                agree(works, workdir)
                _finish(*_run_all(works, workdir), workdir)

    return programs.exit_code(study)


def agree(works: Sequence[experiment.Experiment], workdir: pathlib.Path) -> None:
    """Check, before any training, that all processes are about to do the same.

    Raises:
      ConfigError: settings, code, data, plan or the run directory differ.
    """
    if not processes.several():
        return
    facts = experiment.facts(works)
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
    config: dict[str, Any],
    workdir: pathlib.Path,
    reuse_from: Sequence[str | pathlib.Path] = (),
    command: Sequence[str] = (),
) -> list[experiment.Experiment]:
    """One of each seed. All are made before the first runs: errors show at once."""
    study = settings.from_mapping(config)
    files.check_folder("--workdir", workdir)
    _check_seeds(workdir, study.seeds)
    folders = {study.seed: workdir}
    if study.seeds > 1:
        seeds = range(study.seed, study.seed + study.seeds)
        folders = {seed: workdir / f"seed_{seed}" for seed in seeds}
    return [
        experiment.Experiment(
            dataclasses.replace(study, seed=seed, seeds=1),
            folder,
            reuse_from=_same_seed(reuse_from, seed),
            command=command,
        )
        for seed, folder in folders.items()
    ]


def _compare(
    config: dict[str, Any],
    compared: str,
    workdir: pathlib.Path,
    reuse_from: Sequence[str],
    command: Sequence[str],
) -> None:
    """Methods one after the other, in folders of `workdir`; stages are shared."""
    names = compared_methods(compared)
    works = {}
    for name in names:
        mapping = copy.deepcopy(config) | {"compare": ""}
        methods.choose(mapping, name)
        works[name] = studies(mapping, workdir / name, reuse_from, command)
    agree([work for group in works.values() for work in group], workdir)
    fair = fairness.check_fair(works)
    # Mosaic's first stage keeps the clients' models and so serves the others too.
    for name in sorted(names, key=lambda name: not name.startswith("mosaic")):
        _log.info("method %s", name)
        run_sharing(works, name, workdir)
    if environment.is_primary():
        recorded = fairness.check_recorded(works)
        terms = {seed: fair[seed] | recorded[seed] for seed in fair}
        content = {"order": list(names), "equal_terms": terms}
        files.write_json(workdir / "comparison.json", content)
        path = workdir / "comparison.html"
        title = f"{len(names)} methods on {config['data']['name']}"
        groups = runs.collect([workdir])
        rows = comparison.write(groups, path, title=title, terms=terms)
        files.write_json(workdir / "comparison.json", content | {"methods": rows})
        print(comparison.table(rows))
        print(workdir / "comparison.json")
        print(path)


def _estimate(
    config: dict[str, Any], compared: str, workdir: pathlib.Path, reuse_from: Sequence
) -> None:
    """Print what a study, each method of a comparison, would cost."""
    for name in compared_methods(compared) if compared else [""]:
        mapping = copy.deepcopy(config) | {"compare": ""}
        if name:
            print(f"\n{name}")
            methods.choose(mapping, name)
        works = studies(mapping, workdir / name, reuse_from, ())
        done = {stage.name for stage in works[0].finished()}
        costs = estimate.estimate(works[0])
        print(estimate.table(costs, works[0].num_parameters))
        if done:
            print(f"finished already: {', '.join(done)}")
        if len(works) > 1:
            print(f"for each of {len(works)} seeds")


def compared_methods(compared: str) -> Sequence[str]:
    """The methods of a list's name, or of names with commas."""
    return methods.LISTS.get(compared) or compared.split(",")


def run_sharing(
    works: Mapping[str, Sequence[experiment.Experiment]],
    name: str,
    workdir: pathlib.Path,
) -> None:
    """Run the study `name`, of one or more seeds; stages of all others may be used."""
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


def _same_seed(folders: Sequence[str], seed: int) -> list[pathlib.Path]:
    """Of a run of several seeds, the folder of `seed`."""
    paths = [pathlib.Path(folder) for folder in folders]
    return [
        path / f"seed_{seed}" if any(path.glob("seed_*")) else path for path in paths
    ]


def _run_all(
    works: Sequence[experiment.Experiment], workdir: pathlib.Path
) -> tuple[dict[str, Any], list[pathlib.Path]]:
    """As many together as have room; the summary over all, and their reports."""
    summaries, pages = [], []
    at_once = works[0].seeds_at_once if len(works) > 1 else 1
    for first in range(0, len(works), at_once):
        group = works[first : first + at_once]
        summaries += experiment.run_together(group)
        if environment.is_primary():
            pages += [report.write(work.workdir) for work in group]
    if len(works) == 1:
        return summaries[0], pages
    summary = experiment.over_seeds(summaries)
    if environment.is_primary():
        files.write_json(workdir / "summary.json", summary)
    return summary, pages


def _finish(
    summary: dict[str, Any], pages: Sequence[pathlib.Path], workdir: pathlib.Path
) -> None:
    if environment.is_primary():
        print_summary(summary)
        print(f"summary  {workdir / 'summary.json'}")
        for page in pages:
            print(f"report   {page}")


def print_summary(summary: dict[str, Any]) -> None:
    """Table of accuracies on stdout, over several seeds with their spread."""
    sets = [name for name in ("test", "validation") if f"{name}_accuracy" in summary]
    width = 12 if "seed" in summary else 18
    print(f"{'accuracy':<16}" + "".join(f"{name:>{width}}" for name in sets))
    for model in summary["test_accuracy"]:
        shown = [_shown(summary[f"{name}_accuracy"].get(model, "")) for name in sets]
        print(f"{model:<16}" + "".join(f"{value:>{width}}" for value in shown))


def _shown(value: float | dict[str, float] | str) -> str:
    if not value:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.4f} ± {value['spread']:.4f}"
    return f"{value:.4f}"


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        path = pathlib.Path(cache) / "mosaic_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(path))
    # The small ones too: by default programs that compile within a second are left out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
