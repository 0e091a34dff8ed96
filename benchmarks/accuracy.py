"""Accuracy of all methods over Dirichlet alphas and seeds, on equal terms.

    python -m benchmarks.accuracy --name digits --alphas 0.01,0.1,1.0 --seeds 0,1,2
    python -m benchmarks.accuracy --name fashion_mnist:small --methods fedavg,mosaic
    python -m benchmarks.accuracy --name digits --methods fedavg,mosaic --dtype bfloat16
    python -m benchmarks.accuracy --methods "fedavg[local.learning_rate=0.1]"

Split, initial model, local work and number of rounds are those of
configs/NAME_mosaic.py; stages that methods have in common are run once. Prints the
tables of docs/results.md (Markdown, mean and standard deviation over seeds, per cent on
test images) and keeps what it measured in benchmarks/results/accuracy_NAME.json (of
activations in bfloat16: accuracy_NAME_bfloat16.json): cells that stand there with the
settings of today are not measured again, so that several commands may fill the tables,
at the same time too if each has seeds of its own. Cells with other settings are left
out of the tables until they are measured anew.
"""

import argparse
import functools
import json
import operator
import pathlib
import statistics
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util

from benchmarks import timing
from mosaic_jax.cli import config_files, launch
from mosaic_jax.core import schema
from mosaic_jax.report import comparison
from mosaic_jax.run import methods, settings, study
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings

# What a cell says of each model: the head of its column, by the name of the model.
MODELS = {
    "experts_mean": "experts' mean",
    "diagonal": "experts of their classes",
    "teacher": "teacher",
    "distilled": "distilled",
    "final": "final",
    "personal": "clients' own",
}
Cell = dict[str, Any]
KEY = ("alpha", "seed", "method")


def study_of(
    name: str, alpha: float, seed: int, method: str, dtype: str = "float32"
) -> Settings:
    """`method` on the terms of configs/NAME_mosaic.py.

    Args:
      name: of the data set, and the config's variant after a colon.
      alpha: of the Dirichlet split.
      seed: of the study.
      method: as `compare` takes it, and in brackets a field that is set otherwise.
      dtype: of activations.
    """
    name, colon, variant = name.partition(":")
    config = config_files.load(f"{name}_mosaic{colon}{variant}")
    config.data.alpha = alpha
    config.seed = seed
    config.model.dtype = dtype
    config.log.trackers = ()
    method, _, changed = method.partition("[")
    found = methods.with_method(settings.from_mapping(config.to_dict()), method)
    if not changed:
        return found
    field, _, value = changed.removesuffix("]").partition("=")
    values = {field: json.loads(value)}
    return settings.from_mapping(methods.changed(schema.to_mapping(found), values))


def folder(
    root: pathlib.Path, name: str, alpha: float, seed: int, dtype: str = "float32"
) -> pathlib.Path:
    """Where the run directories of one alpha and seed are, each called by its method.

    Args:
      root: of all run directories.
      name: as of `study_of`.
      alpha: likewise.
      seed: likewise.
      dtype: likewise.
    """
    return root / f"{name.replace(':', '_')}_{alpha}_{seed}_{dtype}"


def measure(config: Settings, method: str, workdir: pathlib.Path) -> Cell:
    """One cell.

    Args:
      config: of `study_of`.
      method: its name.
      workdir: of `folder`; what studies there have in common with this one is reused.
    """
    others = [path for path in workdir.glob("*") if (path / "stages").is_dir()]
    summary = Experiment(
        config, workdir / urllib.parse.quote(method, safe=""), reuse_from=others
    ).run()
    return {
        "alpha": config.data.alpha,
        "seed": config.seed,
        "method": method,
        "settings": read_fields(config),
        **timing.occasion(),
        **summary.accuracies,
        "distilled_kept": summary.distilled_kept,
        "rounds": summary.rounds,
        "split": summary.partition["sha256"],
        "bytes": {
            direction: sum(payloads.values())
            for direction, payloads in summary.communication_bytes.items()
        },
        "flops": comparison.cost_of(summary.flops),
        "server": comparison.server_work(schema.to_mapping(config)),
    }


def read_fields(config: Settings) -> dict[str, Any]:
    """The fields that can change a result, as JSON has them, and studies' format.

    Those of methods that the study does not run are left out.
    """
    mine = {config.init.method, config.server.method}
    fields = {
        name: value
        for name, value in schema.flat(config).items()
        if not schema.is_covered(name, settings.NEUTRAL)
        and not (name.startswith("methods.") and name.split(".")[1] not in mine)
    }
    return json.loads(json.dumps(fields | {"format": study.FORMAT}))


def is_of_today(cell: Cell, config: Settings) -> bool:
    """Whether a cell has the settings of `config`.

    Fields that came after the cell was measured must have their defaults.
    """
    then, today = cell["settings"], read_fields(config)
    defaults = flax.traverse_util.flatten_dict(settings.defaults(), sep=".")
    new = today.keys() - then.keys()
    return then == {n: today[n] for n in today.keys() - new} and all(
        json.loads(json.dumps(defaults.get(name))) == today[name] for name in new
    )


def told(cells: Sequence[Cell], today: Mapping[str, Settings]) -> str:
    """The table of one alpha, under what it was measured on.

    Args:
      cells: of the alpha.
      today: settings of each cell's study, by its seed and method, see `_key`.
    """
    kept = [cell for cell in cells if is_of_today(cell, today[_key(cell)])]
    on = sorted({f"{cell['processor']}, {cell['date']}" for cell in kept})
    stale = [_key(cell) for cell in cells if cell not in kept]
    lines = [f"alpha {cells[0]['alpha']}; {'; '.join(on)}"]
    if stale:
        lines += [f"of other settings, to be measured anew: {', '.join(sorted(stale))}"]
    return "\n".join([*lines, "", table(kept)])


def _key(cell: Cell) -> str:
    return f"{cell['method']} of seed {cell['seed']}"


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row for each method of one alpha, in the order of `compare`.

    Raises:
      AssertionError: two methods had other splits or numbers of rounds.
    """
    for name in ("split", "rounds"):
        for seed in {cell["seed"] for cell in cells}:
            found = {cell[name] for cell in cells if cell["seed"] == seed}
            assert len(found) == 1, f"seed {seed}: unequal {name}: {found}"
    columns: dict[str, Callable[[list[Cell]], str]] = {
        "seeds": lambda row: ", ".join(str(cell["seed"]) for cell in row),
        **{
            head: lambda row, model=model: mean_spread(
                [cell["test"][model] for cell in row if model in cell["test"]]
            )
            for model, head in MODELS.items()
        },
        "MB up": lambda row: f"{_mean(row, 'bytes', 'up') / 1e6:.1f}",
        "MB down": lambda row: f"{_mean(row, 'bytes', 'down') / 1e6:.1f}",
        "TFLOP": lambda row: f"{_mean(row, 'flops') / 1e12:.3g}",
        "training on the server": lambda row: row[0]["server"],
    }
    names = sorted({cell["method"] for cell in cells}, key=_place)
    cells = sorted(cells, key=lambda cell: cell["seed"])
    rows = {name: [cell for cell in cells if cell["method"] == name] for name in names}
    kept = {n: of for n, of in columns.items() if any(of(r) for r in rows.values())}
    lines = [["method", *kept], ["---"] * (len(kept) + 1)]
    lines += [[name, *(of(row) for of in kept.values())] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(row: list[Cell], *path: str) -> float:
    """Mean over seeds of a number, found by the keys of `path`."""
    found: list[Any] = [functools.reduce(operator.getitem, path, cell) for cell in row]
    return statistics.mean(found)


def _place(method: str) -> tuple[int, str]:
    name = method.partition("[")[0].removesuffix(methods.DECAY)
    known = methods.COMPARED
    return known.index(name) if name in known else len(known), method


def mean_spread(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation, in per cent; "" of none."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Measure the cells that are wanted and not there, then print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="digits", help="config, and :VARIANT")
    parser.add_argument("--methods", default="all", help="a list's name, or methods")
    parser.add_argument("--alphas", default="0.01,0.1,1.0")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workdir", default="runs/accuracy")
    args = parser.parse_args()
    launch.prepare()
    name = args.name.replace(":", "_")
    end = "" if args.dtype == "float32" else f"_{args.dtype}"
    path = timing.RESULTS / f"accuracy_{name}{end}.json"
    wanted = methods.LISTS.get(args.methods, args.methods.split(","))
    for alpha in map(float, args.alphas.split(",")):
        for seed in map(int, args.seeds.split(",")):
            terms = args.name, alpha, seed
            workdir = folder(pathlib.Path(args.workdir), *terms, args.dtype)
            for method in wanted:
                config = study_of(*terms, method, args.dtype)
                there = [
                    cell
                    for cell in timing.kept(path)
                    if [cell[name] for name in KEY] == [alpha, seed, method]
                ]
                if not any(is_of_today(cell, config) for cell in there):
                    cell = measure(config, method, workdir)
                    timing.keep(path, cell, *KEY)
                    print(json.dumps(cell), flush=True)
    cells = timing.kept(path)
    for alpha in sorted({cell["alpha"] for cell in cells}):
        here = [cell for cell in cells if cell["alpha"] == alpha]
        today = {
            _key(cell): study_of(
                args.name, alpha, cell["seed"], cell["method"], args.dtype
            )
            for cell in here
        }
        print(f"\n{told(here, today)}")


if __name__ == "__main__":
    main()
