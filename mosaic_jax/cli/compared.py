"""Several methods, one after the other, that share each other's stages."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from mosaic_jax.cli import experiments
from mosaic_jax.core import errors, files
from mosaic_jax.report import comparison, runs
from mosaic_jax.run import checks, environment, fairness, methods, processes, programs
from mosaic_jax.run.mirror import Mirror
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)


def run(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    command: Sequence[str],
    mirror: Mirror | None,
) -> None:
    """Run methods one after the other, in folders of `workdir`; stages are shared.

    Args:
      study: settings, with `compare`.
      workdir: run directory; the comparison's table and page are written there.
      reuse_from: run directories whose finished stages may be used.
      command: by which it was started, for the records.
      mirror: keeps a copy of `workdir`; None: none does.

    Raises:
      SomeFailed: some method was stopped; the others have finished.
    """
    works = by_method(study, workdir, reuse_from, command, mirror=mirror)
    experiments.agree([work for group in works.values() for work in group], workdir)
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


def by_method(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    command: Sequence[str] = (),
    data: experiments.DataOf = experiments.as_named,
    mirror: Mirror | None = None,
) -> dict[str, list[Experiment]]:
    """The studies of each method of a comparison, one per seed.

    Args:
      study: settings, with `compare`.
      workdir: run directory; each method has a folder in it.
      reuse_from: run directories whose finished stages may be used.
      command: by which it was started, for the records.
      data: makes the data of a seed, see `experiments.make`.
      mirror: keeps a copy of `workdir`; None: none does.
    """
    works = {}
    for name in _compared(study):
        with _named(name):
            works[name] = experiments.make(
                study_of_method(study, name),
                workdir / name,
                reuse_from,
                command,
                data,
                mirror,
            )
    return works


@contextlib.contextmanager
def _named(method: str) -> Iterator[None]:
    """Within it, errors of settings say of which method of a comparison they are."""
    try:
        yield
    except errors.ConfigError as error:
        lines = (f"compare, {method}: {line}" for line in str(error).splitlines())
        raise errors.ConfigError("\n".join(lines)) from error


def study_of_method(study: Settings, name: str) -> Settings:
    """The study of one method of a comparison.

    Fields of components that only the others use are left out: they would be unknown.
    """
    alone = dataclasses.replace(study, compare="")
    of_each = {one: methods.with_method(alone, one) for one in _compared(study)}
    groups = {one: checks.components(of_each[one]).keys() for one in of_each}
    others = set().union(*groups.values()) - groups[name]
    kept = {k: fields for k, fields in study.methods.items() if k not in others}
    return dataclasses.replace(of_each[name], methods=kept)


def _compared(study: Settings) -> Sequence[str]:
    """The methods of `compare`: of a list's name, or names with commas.

    Raises:
      ConfigError: a name stands there twice.
    """
    if not study.compare:
        return ()
    names = methods.LISTS.get(study.compare) or study.compare.split(",")
    if len(set(names)) < len(names):
        raise errors.ConfigError(
            f"compare = {study.compare!r}: must have every method once"
        )
    return names


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
        experiments.run(works[name], workdir / name)
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
