"""The search that every method had: four settings each, by validation accuracy.

    python -m benchmarks.search --name digits
    python -m benchmarks.search --name digits --methods feddf,fedgen

Seed 10, which no table of results has, at alpha 0.01. Split, model, local work and
rounds are those of configs/NAME_mosaic.py; stages that a setting leaves alone are run
once. Prints a table (Markdown, per cent, mean over seeds, on validation images; the
configured setting in bold) and keeps what it measured in
benchmarks/results/search_NAME.json, where several commands may add at a time.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import timing
from mosaic_jax.cli import config_files, launch
from mosaic_jax.core import schema
from mosaic_jax.run import methods, settings
from mosaic_jax.run.runner import Experiment

# Of each method the settings that were tried: dotted fields and their values.
TRIED: dict[str, list[dict[str, Any]]] = {
    "fedavg": [{"local.learning_rate": rate} for rate in (0.02, 0.05, 0.1, 0.2)],
    "fedprox": [{"methods.fedprox.mu": mu} for mu in (0.001, 0.01, 0.1, 1.0)],
    "fedrs": [{"methods.fedrs.alpha": alpha} for alpha in (0.25, 0.5, 0.75, 0.9)],
    "fedlc": [{"methods.fedlc.tau": tau} for tau in (0.1, 0.3, 1.0, 3.0)],
    "feddyn": [{"methods.feddyn.alpha": alpha} for alpha in (0.001, 0.01, 0.1, 1.0)],
    "feddf": [
        {"methods.feddf.learning_rate": rate} for rate in (2.5e-4, 5e-4, 1e-3, 2e-3)
    ],
    "fedgen": [
        {"methods.fedgen.label_weight": weight, "methods.fedgen.match_weight": weight}
        for weight in (0.1, 1.0, 3.0, 10.0)
    ],
    "dense": [
        {
            "methods.dense.student_learning_rate": rate,
            "server.batch_norm": mode,
        }
        for rate in (0.005, 0.02)
        for mode in ("eval", "train")
    ],
    "coboosting": [
        {"methods.coboosting.student_learning_rate": rate}
        for rate in (5e-4, 1e-3, 2e-3, 5e-3)
    ],
    "fedftg": [
        {"methods.fedftg.student_learning_rate": rate, "server.batch_norm": mode}
        for rate in (0.003, 0.01)
        for mode in ("eval", "train")
    ],
    "dfrd": [
        {"methods.dfrd.student_learning_rate": rate, "server.batch_norm": mode}
        for rate in (0.003, 0.01)
        for mode in ("eval", "train")
    ],
    "mosaic": [
        {"distill.learning_rate": rate} for rate in (0.0005, 0.001, 0.002, 0.004)
    ],
}


KEY = ("method", "fields", "alpha", "seed")


def measure(
    base: settings.Settings, method: str, fields: dict[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """Validation accuracies of `method` with `fields`.

    Args:
      base: the Mosaic study on whose terms it runs.
      method: its name.
      fields: what is set otherwise, by dotted name.
      workdir: of all settings.
    """
    config = methods.with_method(base, method)
    config = settings.from_mapping(methods.changed(schema.to_mapping(config), fields))
    name = "_".join([method, *(str(value) for value in fields.values())])
    others = [path for path in workdir.glob("*") if (path / "stages").is_dir()]
    summary = Experiment(config, workdir / name, reuse_from=others).run()
    return {
        "method": method,
        "fields": fields,
        "alpha": base.data.alpha,
        "seed": base.seed,
        **timing.occasion(),
        "validation": summary.accuracies["validation"],
    }


def table(base: settings.Settings, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each method, its settings with their accuracies.

    Args:
      base: the Mosaic study that tells which setting is the configured one.
      rows: of `measure`.
    """
    lines = ["| method | settings: validation accuracy, % |", "|---|---|"]
    for method, tried in TRIED.items():
        configured = schema.flat(methods.with_method(base, method)).items()
        shown = []
        for fields in tried:
            found = [
                row["validation"]["final"]
                for row in rows
                if (row["method"], row["fields"]) == (method, fields)
            ]
            told = ", ".join(
                f"{name.rpartition('.')[2]} {value}" for name, value in fields.items()
            )
            if found:
                told += f": {100 * statistics.mean(found):.1f}"
                shown.append(f"**{told}**" if fields.items() <= configured else told)
        if shown:
            lines.append(f"| {method} | {'; '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every setting, then print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="digits", help="config, and :VARIANT")
    parser.add_argument("--methods", default=",".join(TRIED))
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--workdir", default="runs/search")
    args = parser.parse_args()
    launch.prepare()
    name, colon, variant = args.name.partition(":")
    config = config_files.load(f"{name}_mosaic{colon}{variant}")
    config.data.alpha = args.alpha
    config.seed = args.seed
    config.audit.images = 0
    config.log.trackers = ()
    base = settings.from_mapping(config.to_dict())
    called = args.name.replace(":", "_")
    workdir = pathlib.Path(args.workdir) / f"{called}_{args.alpha}_{args.seed}"
    path = timing.RESULTS / f"search_{called}.json"
    for method in args.methods.split(","):
        for fields in TRIED[method]:
            row = measure(base, method, fields, workdir)
            timing.keep(path, row, *KEY)
            print(json.dumps(row), flush=True)
    rows = [row for row in timing.kept(path) if row["alpha"] == args.alpha]
    print(table(base, rows))


if __name__ == "__main__":
    main()
