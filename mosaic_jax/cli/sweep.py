r"""Many studies of one config, which share every stage that is the same.

mosaic sweep --config digits_mosaic \
    --grid distill.steps=100,200 --grid data.alpha=0.01,0.1 --seeds 3

Each cell of the grid is a study in a folder of the workdir; --config.FIELD=VALUE, as to
mosaic run, holds in all of them. The same command goes on where it stopped, and several
may share the work: each takes cells that no other works on. A cell that comes to no end
stops no other, and the exit code is 3. `mosaic submit sweep` submits cells to Slurm.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax.cli import (
    claims,
    compared,
    config_files,
    experiments,
    grids,
    launch,
    own_parts,
)
from mosaic_jax.core import errors, files
from mosaic_jax.report import comparison, runs
from mosaic_jax.run import config_file, methods, programs, settings
from mosaic_jax.run.runner import Experiment

# Bytes of a file's name on common file systems, but for what is added to a cell's name.
_LONGEST_NAME = 240


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cells of a grid by name, each with its settings.

    Attributes:
      workdir: a folder for each cell lies in it.
      cells: name to the nested settings.
    """

    workdir: pathlib.Path
    cells: dict[str, dict[str, Any]]

    def studies(self) -> dict[str, list[Experiment]]:
        """Of each cell, one per seed. Errors in any cell show before work starts.

        Raises:
          MosaicError: a cell's settings or data are wrong.
        """
        launch.make_devices(*self.cells.values())
        return {
            name: experiments.make(settings.from_mapping(config), self.workdir / name)
            for name, config in self.cells.items()
        }


def build(
    config: dict[str, Any],
    grid: Sequence[tuple[str, list[Any]]],
    seeds: int,
    workdir: pathlib.Path,
    fixed: Sequence[tuple[str, Any]] = (),
) -> Sweep:
    """Every combination of the grid's values, in the order given.

    Args:
      config: nested settings of every field.
      grid: fields by dotted name, each with its values.
      seeds: of each cell.
      workdir: the cells' run directories lie in it.
      fixed: fields that have one value in all cells, and no part in their names.

    Raises:
      ConfigError: a field is given twice, or two cells would have the same folder.
    """
    fields = [field for field, _ in grid]
    given = [*fields, *(field for field, _ in fixed)]
    for field in given:
        if given.count(field) > 1:
            raise errors.ConfigError(
                f"{field}: is given twice: must be --grid {field}=VALUE,VALUE,... or"
                f" --config.{field}=VALUE"
            )
    cells: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*(found for _, found in grid)):
        values = dict(zip(fields, combination, strict=True))
        name = ",".join(
            f"{field}={value}".replace("/", "_").replace(" ", "")
            for field, value in values.items()
        )
        if len(name.encode()) > _LONGEST_NAME:
            raise errors.ConfigError(
                f"--grid: {name[:60]}... would be a folder's name of"
                f" {len(name.encode())} bytes: must be at most {_LONGEST_NAME}; fields"
                " that all cells share are given as --config.FIELD=VALUE"
            )
        if name in cells:
            raise errors.ConfigError(
                f"--grid: several cells would have the folder {name}: must be values"
                " of different names"
            )
        cells[name or "study"] = methods.changed(
            config, dict(fixed) | values | {"seeds": seeds}
        )
    return Sweep(workdir, cells)


def shared(studies: dict[str, list[Experiment]]) -> dict[str, tuple[int, int]]:
    """Of each cell, stages to compute and stages that others have computed before.

    In the order of the cells; what is on disk counts as computed before.
    """
    seen = _finished(studies)
    result = {}
    for name, works in studies.items():
        plans = _fingerprints(works)
        new = [fingerprint for fingerprint in plans if fingerprint not in seen]
        seen.update(new)
        result[name] = (len(new), len(plans) - len(new))
    return result


def _finished(studies: Mapping[str, Sequence[Experiment]]) -> set[str]:
    """Fingerprints of the stages that are finished in some cell."""
    return {
        path.name
        for works in studies.values()
        for work in works
        for path in work.workdir.glob("stages/*/*")
        if (path / "done.json").exists()
    }


def _fingerprints(works: Sequence[Experiment]) -> list[str]:
    """Those of the stages of a cell, seed by seed."""
    return [fingerprint for work in works for _, fingerprint in work.plan()]


def waves(studies: dict[str, list[Experiment]]) -> list[list[str]]:
    """Cells that may run at the same time: none computes what another one does.

    Later waves find what earlier ones computed.
    """
    left = {name: set(_fingerprints(works)) for name, works in studies.items()}
    done: set[str] = set()
    result = []
    while left:
        claimed: set[str] = set()
        wave = []
        for name, fingerprints in left.items():
            needed = fingerprints - done
            if not needed & claimed:
                wave.append(name)
                claimed |= needed
        for name in wave:
            del left[name]
        done |= claimed
        result.append(wave)
    return result


def tell(sweep: Sweep) -> None:
    """Print the cells, and how many stages each has to run; nothing is run."""
    counts = shared(sweep.studies())
    for name, (new, old) in counts.items():
        print(f"{name}: {new} stages to run, {old} shared")
    new, old = (sum(part) for part in zip(*counts.values(), strict=True))
    print(f"{len(counts)} cells, stages: {new} to run, {old} of {new + old} shared")
    print("what a cell costs: mosaic run --dry_run with its settings")


def run(sweep: Sweep, only: int | None = None) -> None:
    """Run all cells, or the one of number `only`; finished stages are found.

    Cells that other processes work on are left to them, and waited for.

    Raises:
      SomeFailed: cells came to no end; all others are finished.
    """
    studies = sweep.studies()
    names = list(studies) if only is None else [list(studies)[only]]
    counts = shared(studies)
    mine = claims.Claims(sweep.workdir)
    while left := [name for name in names if not mine.settled(name)]:
        done = _finished(studies)
        needs = {name: set(_fingerprints(studies[name])) - done for name in left}
        with mine.take(needs) as name:
            if name is None:
                claims.pause()
            elif not mine.settled(name):
                new, old = counts[name]
                print(f"{name}: {new} stages to run, {old} shared")
                mine.settle(name, compared.run_sharing(studies, name, sweep.workdir))
    failures = {name: told for name in names if (told := mine.failure(name))}
    if only is None and len(failures) < len(names):
        report(sweep, counts)
    if failures:
        raise errors.SomeFailed(failures)


def report(sweep: Sweep, counts: Mapping[str, tuple[int, int]] | None = None) -> None:
    """sweep.json, sweep.html and the table over all cells that came to an end.

    The others are named with what stopped them.

    Args:
      sweep: all cells.
      counts: of stages, as of `shared`.

    Raises:
      ConfigError: a cell was run with other settings, as by another sweep.
      DataError: no cell has finished, or one cannot be read.
    """
    if not sweep.workdir.is_dir():
        raise errors.DataError(f"--workdir = {sweep.workdir}: no such folder")
    mine = claims.Claims(sweep.workdir)
    failed = {name: told for name in sweep.cells if (told := mine.failure(name))}
    if len(failed) == len(sweep.cells):
        raise errors.DataError(f"--workdir = {sweep.workdir}: no cell has finished")
    for name in sweep.cells.keys() - failed.keys():
        config = sweep.cells[name]
        # A report may be drawn where there is no GPU, for which "auto" is another type.
        but = {"model.dtype"} if config["model"]["dtype"] == "auto" else ()
        study = settings.from_mapping(config)
        for folder, one in experiments.of_seeds(study, sweep.workdir / name).items():
            config_file.check_same_settings(folder, one, but)
    with mine.alone():
        _report(sweep, counts or {}, failed)


def _report(
    sweep: Sweep, counts: Mapping[str, tuple[int, int]], failed: Mapping[str, str]
) -> None:
    """`report` without the cells `failed`."""
    order = [name for name in sweep.cells if name not in failed]
    content: dict[str, Any] = {"order": order, "failed": dict(failed)}
    path = sweep.workdir / "sweep.json"
    files.write_json(path, content)
    page = sweep.workdir / "sweep.html"
    rows = comparison.write(
        runs.collect([sweep.workdir]), page, title=f"Sweep of {len(sweep.cells)} cells"
    )
    counts = {name: found for name, found in counts.items() if name in rows}
    for name, (new, old) in counts.items():
        rows[name] |= {"stages_computed": new, "stages_shared": old}
    files.write_json(path, content | {"cells": rows})
    print(comparison.table(rows))
    for name, told in failed.items():
        print(f"{name}: came to no end: {told}")
    if counts:
        new, old = (sum(part) for part in zip(*counts.values(), strict=True))
        print(f"stages: {new} computed, {old} of {new + old} shared")
    print(page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: see `programs.exit_code`."""
    args = parse_words(arguments)
    launch.prepare()
    return programs.exit_code(lambda: _sweep(args))


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = programs.parser("sweep", __doc__)
    parser.add_argument("--config", required=True, help="as of mosaic run")
    parser.add_argument(
        "--grid", action="append", default=[], help="FIELD=VALUE,VALUE; repeatable"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each cell")
    parser.add_argument(
        "--workdir", type=pathlib.Path, default=pathlib.Path("runs/sweep")
    )
    parser.add_argument("--cell", type=int, help="run this cell only, from 0")
    parser.add_argument(
        "--report",
        action="store_true",
        help="only the table and page of what has finished",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only check all cells, and tell how many stages they have and share",
    )
    return parser


def parse_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line; in `fixed` those that begin with --config."""
    args, fixed = parser().parse_known_args(words)
    if wrong := [word for word in fixed if not word.startswith("--config.")]:
        parser().error(f"unrecognized arguments: {' '.join(wrong)}")
    args.fixed = fixed
    return args


def parse(
    config: str,
    grid: Sequence[str],
    seeds: int,
    workdir: pathlib.Path,
    fixed: Sequence[str] = (),
) -> Sweep:
    """The sweep that the command line describes.

    Args:
      config: as of `mosaic run`.
      grid: FIELD=VALUE,VALUE,... each.
      seeds: of each cell.
      workdir: the cells' run directories lie in it.
      fixed: --config.FIELD=VALUE each, the same in all cells.

    Raises:
      ConfigError: there is no such configuration, a field is unknown, or a value is not
        of its type.
    """
    found = config_files.load(config)
    words = [*grid, *(word.removeprefix("--config.") for word in fixed)]
    named = [(one.partition("=")[0], one.partition("=")[2]) for one in words]
    own = own_parts.add_defaults(found, named)
    mapping = found.to_dict()
    values = [grids.swept(one, mapping) for one in grid]
    same = [grids.fixed(word, mapping) for word in fixed]
    sweep = build(mapping, values, seeds, workdir, same)
    for cell in sweep.cells.values():
        cell["compare"] = ""  # each cell is one study
        for group in own_parts.unused(cell, own):
            del cell["methods"][group]
    return sweep


def _sweep(args: argparse.Namespace) -> None:
    files.check_folder("--workdir", args.workdir)
    sweep = parse(args.config, args.grid, args.seeds, args.workdir, args.fixed)
    if args.cell is not None and not 0 <= args.cell < len(sweep.cells):
        raise errors.ConfigError(
            f"--cell = {args.cell}: must be in [0, {len(sweep.cells) - 1}]"
        )
    if args.dry_run:
        tell(sweep)
    elif args.report:
        report(sweep)
    else:
        run(sweep, args.cell)


if __name__ == "__main__":
    sys.exit(main())
