"""Accuracy of methods at several epsilons, on equal terms.

    python -m benchmarks.private_accuracy --name digits --seeds 0,1,2
    python -m benchmarks.private_accuracy --name fashion_mnist:small --seeds 0

Settings are those of `benchmarks.accuracy` (split, rounds and steps of
configs/NAME_mosaic.py) with what private images need: the `cnn` with group-norm, and
one prototype a class. Epsilon `inf` is the same study without privacy. Nothing is tuned
for any epsilon. Prints a table for each data set of test accuracy in per cent, mean and
standard deviation over seeds, of those studies that came to an end, and keeps what it
measured in benchmarks/results/private_accuracy.json: cells that stand there with the
settings of today are not measured again.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import accuracy, timing
from mosaic_jax.cli import launch
from mosaic_jax.core import errors, schema
from mosaic_jax.run import methods, settings
from mosaic_jax.run.settings import Settings

PATH = timing.RESULTS / "private_accuracy.json"
METHODS = ("fedavg", "dense", "mosaic")
EPSILONS = (float("inf"), 8.0, 3.0, 1.0)
KEY = ("name", "seed", "method", "epsilon")
CHANGES = {
    "model.name": "cnn",
    "model.norm": "group",
    "prototypes.clusters": 1,
    "audit.images": 0,
}


def study_of(name: str, seed: int, method: str, epsilon: float) -> Settings:
    """A study at alpha 0.01.

    Args:
      name: of the data set, and the config's variant after a colon.
      seed: of the study.
      method: as `compare` takes it.
      epsilon: of each client's images; inf: not private.
    """
    plain = accuracy.study_of(name, 0.01, seed, method)
    changes = CHANGES | {"privacy.epsilon": epsilon}
    return settings.from_mapping(methods.changed(schema.to_mapping(plain), changes))


def measure(key: dict[str, Any], root: pathlib.Path) -> None:
    """Run the study of a cell, unless it stands in the file, and keep what came out."""
    config = study_of(**key)
    for cell in timing.kept(PATH):
        same = all(cell[name] == _plain(key)[name] for name in KEY)
        if same and is_of_today(cell):
            return
    folder = root / f"{key['name'].replace(':', '_')}_{key['seed']}_{key['epsilon']}"
    try:
        found = accuracy.measure(config, key["method"], folder)
    except errors.MosaicError as error:  # all generators are noise, for example
        fields = {"settings": accuracy.read_fields(config), "test": {}}
        found = fields | {"stopped": str(error), **timing.occasion()}
    cell = _plain(key) | found
    timing.keep(PATH, cell, *KEY)
    print(json.dumps(cell), flush=True)


def is_of_today(cell: dict[str, Any]) -> bool:
    """Whether a cell has the settings that its study has today."""
    name, seed, method, epsilon = (cell[part] for part in KEY)
    return accuracy.is_of_today(cell, study_of(name, seed, method, float(epsilon)))


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """A cell's key as JSON has it, which knows no infinity."""
    return key | {"epsilon": str(key["epsilon"])}


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each method and model, a column for each epsilon.

    Cells of other settings are to be left out before.

    The column "ended" has how many studies came to an end at each epsilon.
    """
    rows = []
    for method in METHODS:
        for model in ("teacher", "final"):
            found = [
                [
                    cell["test"][model]
                    for cell in cells
                    if (cell["method"], cell["epsilon"]) == (method, str(epsilon))
                    and model in cell["test"]
                ]
                for epsilon in EPSILONS
            ]
            if any(found):
                means = [accuracy.mean_spread(values) for values in found]
                seeds = ", ".join(str(len(values)) for values in found)
                rows.append([f"{method}, {model}", seeds, *means])
    return timing.table(["epsilon", "ended", *map(str, EPSILONS)], rows)


def main() -> None:
    """Measure the cells that are wanted and not there, then print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="digits", help="config, and :VARIANT")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epsilons", default=",".join(map(str, EPSILONS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workdir", default="runs/private_accuracy")
    args = parser.parse_args()
    launch.prepare()
    root = pathlib.Path(args.workdir)
    for seed in map(int, args.seeds.split(",")):
        for epsilon in map(float, args.epsilons.split(",")):
            for method in args.methods.split(","):
                key = {"name": args.name, "seed": seed}
                measure(key | {"method": method, "epsilon": epsilon}, root)
    cells = [cell for cell in timing.kept(PATH) if is_of_today(cell)]
    for name in sorted({cell["name"] for cell in cells}):
        print(f"\n{name}\n\n{table([c for c in cells if c['name'] == name])}")


if __name__ == "__main__":
    main()
