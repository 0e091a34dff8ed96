"""Accuracy of Mosaic and of FedAvg over Dirichlet alphas and seeds.

    python -m benchmarks.accuracy --name digits --alphas 0.01,0.1 --seeds 0,1,2
    python -m benchmarks.accuracy --name digits --dtype bfloat16

Both methods share split, initial model, local work and total number of rounds;
FedAvg goes on from Mosaic's first stage. Prints the table of docs/results.md (Markdown,
mean and standard deviation over seeds, per cent) and writes
benchmarks/results/accuracy_NAME.json (of activations in bfloat16:
accuracy_NAME_bfloat16.json).
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

from mosaic_jax.cli import config_files, launch
from mosaic_jax.core import files
from mosaic_jax.run import environment, methods, settings
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings

COLUMNS = ("fedavg", "experts_mean", "diagonal", "teacher", "distilled", "final")


def studies(
    name: str, alpha: float, seed: int, dtype: str = "float32"
) -> tuple[Settings, Settings]:
    """Mosaic by configs/NAME_mosaic.py, and its control.

    Args:
      name: of the data set, and the config's variant after a colon.
      alpha: of the Dirichlet split.
      seed: of both studies.
      dtype: of activations.
    """
    name, colon, variant = name.partition(":")
    config = config_files.load(f"{name}_mosaic{colon}{variant}")
    config.data.alpha = alpha
    config.seed = seed
    config.model.dtype = dtype
    config.log.tensorboard = False
    mosaic = settings.from_mapping(config.to_dict())
    return mosaic, methods.with_method(mosaic, "fedavg")


def folder(
    root: pathlib.Path, name: str, alpha: float, seed: int, dtype: str = "float32"
) -> pathlib.Path:
    """Where the run directories of one cell are, "mosaic" among them.

    Args:
      root: of all cells.
      name: as of `studies`.
      alpha: likewise.
      seed: likewise.
      dtype: likewise.
    """
    return root / f"{name.replace(':', '_')}_{alpha}_{seed}_{dtype}"


def measure(
    name: str, alpha: float, seed: int, dtype: str, root: pathlib.Path
) -> dict[str, dict[str, float]]:
    """Accuracies of one cell.

    Args:
      name: as of `studies`.
      alpha: likewise.
      seed: likewise.
      dtype: likewise.
      root: of the run directories.

    Returns:
      {"test": {column: accuracy}, "validation": ...}.
    """
    workdir = folder(root, name, alpha, seed, dtype)
    config, control = studies(name, alpha, seed, dtype)
    mosaic = Experiment(config, workdir / "mosaic").run()
    fedavg = Experiment(
        control, workdir / "fedavg", reuse_from=[workdir / "mosaic"]
    ).run()
    if mosaic.rounds != fedavg.rounds or mosaic.partition != fedavg.partition:
        raise AssertionError("the methods must share the split and the rounds")
    return {
        part: found | {"fedavg": fedavg.accuracies[part]["final"]}
        for part, found in mosaic.accuracies.items()
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one row per alpha."""
    lines = ["| alpha | seeds | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for alpha in dict.fromkeys(cell["alpha"] for cell in cells):
        rows = [cell for cell in cells if cell["alpha"] == alpha]
        shown = [_mean_spread([row["test"][name] for row in rows]) for name in COLUMNS]
        lines.append(f"| {alpha} | {len(rows)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _mean_spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """Measure every cell, then print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="digits")
    parser.add_argument("--alphas", default="0.01,0.1")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workdir", default="runs/accuracy")
    args = parser.parse_args()
    launch.prepare()
    cells = []
    for alpha in map(float, args.alphas.split(",")):
        for seed in map(int, args.seeds.split(",")):
            found = measure(
                args.name, alpha, seed, args.dtype, pathlib.Path(args.workdir)
            )
            cells.append({"alpha": alpha, "seed": seed, **found})
            print(json.dumps(cells[-1]), flush=True)
    print(table(cells))
    name = args.name.replace(":", "_")
    if args.dtype != "float32":
        name += f"_{args.dtype}"
    path = pathlib.Path(__file__).parent / "results" / f"accuracy_{name}.json"
    path.parent.mkdir(exist_ok=True)
    files.write_json(path, {"device": environment.device(), "cells": cells})


if __name__ == "__main__":
    main()
