"""What attacks find in what clients send, with and without differential privacy.

    python -m benchmarks.attacks canaries --seeds 5
    python -m benchmarks.attacks demo

`canaries`: a short FedAvg study of the digits (ten rounds, the `mlp`), 32 canaries for
each of ten clients, without privacy and at epsilon 8, for each seed: the lower bound of
epsilon that each attack shows, and the most that so many canaries could.

`demo`: models, generators and prototypes of the digits demo with half of its rounds and
steps, the `cnn` with group-norm and one prototype a class, without privacy and at
epsilon 8: membership AUC of all clients and of the smallest. What the server does with
them is left out. Shadows train generators without privacy alone: at epsilon 8 most of
the clients' generators collapse and are not sent.

Prints tables; writes benchmarks/results/attacks_NAME.json.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import timing
from configs import baselines, digits_mosaic
from mosaic_jax.cli import launch
from mosaic_jax.run import settings
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.summary import Summary

EPSILON = 8.0
COMMON = {"evaluation.every": 40}
CANARIES = COMMON | {
    "model.name": "mlp",
    "init.rounds": 10,
    "warmup.rounds": 0,
    "finetune.rounds": 0,
    "leakage.images": 256,
    "leakage.canaries": 32,
}
DEMO = COMMON | {
    "model.name": "cnn",
    "model.norm": "group",
    "prototypes.clusters": 1,
    "init.rounds": 20,
    "generators.steps": 250,
    "leakage.images": 256,
    "audit.images": 0,
    "meta.steps": 1,
    "distill.steps": 1,
    "finetune.rounds": 0,
}


def run(config: Any, changes: Mapping[str, Any]) -> Summary:
    """The summary of a study with some fields changed."""
    config.update_from_flattened_dict(dict(changes))
    study = settings.from_mapping(config.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        return Experiment(study, pathlib.Path(folder)).run()


def canaries(seeds: int) -> list[dict[str, Any]]:
    """A row for each seed, epsilon and attack: what canaries show."""
    found = []
    for seed in range(seeds):
        for epsilon in (0.0, EPSILON):
            summary = run(
                baselines.get_config("digits:fedavg"),
                CANARIES | {"seed": seed, "privacy.epsilon": epsilon},
            )
            for row in summary.leakage:
                if row["client"] is None:
                    accuracy = summary.test_accuracy["final"]
                    found.append({"seed": seed, "accuracy": accuracy, **row})
    return found


def demo() -> list[dict[str, Any]]:
    """A row for each epsilon, payload and attack: all clients, and the smallest."""
    found = []
    for epsilon in (0.0, EPSILON):
        changes = DEMO | {
            "privacy.epsilon": epsilon,
            "leakage.shadow_generators": not epsilon,
        }
        summary = run(digits_mosaic.get_config(), changes)
        sizes = np.sum(summary.partition["label_counts"], axis=1)
        for client in (None, int(sizes.argmin())):
            found += [
                {"images": int(sizes.min()), **row}
                for row in summary.leakage
                if row["client"] == client
            ]
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "cannot be told"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("canaries", "demo"))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    launch.prepare()
    if args.what == "canaries":
        rows = canaries(args.seeds)
        head = ("seed", "attack", "epsilon claimed", "at least", "could show")
        head += ("test accuracy, %",)
        cells = [
            (
                row["seed"],
                row["attack"],
                _number(row["epsilon_claimed"]) or "none",
                _number(row["epsilon_lower"]),
                _number(row["epsilon_reach"]),
                f"{100 * row['accuracy']:.1f}",
            )
            for row in rows
        ]
    else:
        rows = demo()
        head = ("epsilon", "clients", "payload", "attack", "AUC")
        head += ("found at 1 % false alarms", "images")
        cells = [
            (
                _number(row["epsilon_claimed"]) or "none",
                "all" if row["client"] is None else f"of {row['images']} images",
                row["payload"],
                row["attack"],
                _interval(row["auc"]),
                _interval(row["tpr_at_fpr"]["1%"]),
                f"{row['members']} + {row['others']}",
            )
            for row in rows
        ]
    print(timing.table(head, cells))
    timing.save(f"attacks_{args.what}", rows)


if __name__ == "__main__":
    main()
