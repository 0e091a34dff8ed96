"""A federated round of many small clients against a PyTorch loop, pfl and Flower.

    python -m benchmarks.environments
    python -m benchmarks.small
    python -m benchmarks.small --networks cnn-4 --clients 100

Five local SGD steps of 16 images of 32 x 32 x 3, FedAvg, for networks so small that the
number of operations counts, not their size. Rivals and terms are those of
`benchmarks.round`. Prints seconds per round (median, low to high, after one round that
is not counted) and the share of the PyTorch loop's; writes them to
benchmarks/results/small.json, which keeps what was measured of other networks and
numbers of clients.
"""

import argparse
import functools
import json
import os

import flax.traverse_util
import numpy as np

from benchmarks import random_data, round, timing
from benchmarks.random_data import DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import parallel
from mosaic_jax.fl.training import Local

# Network and width by the name of the pair.
NETWORKS = {"mlp-64": ("mlp", 64), "cnn-4": ("cnn", 4), "cnn-8": ("cnn", 8)}
CLIENTS = (100, 1000)
LOCAL = Local(steps=5, batch_size=16, learning_rate=0.01, weight_decay=1e-4)
# Our names of a layer's variables to PyTorch's.
_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def state_dict(network: str, model: ModelState) -> dict[str, np.ndarray]:
    """A model's weights by the names, and in the shapes, of `torch_models`.

    Args:
      network: "cnn" or "mlp".
      model: of it.
    """
    found = {}
    for collection in (model.params, model.batch_stats):
        flat = flax.traverse_util.flatten_dict(collection)
        for (layer, name), leaf in flat.items():
            value = np.asarray(leaf)
            if (network, layer) == ("mlp", "hidden_0") and value.ndim == 2:
                # PyTorch flattens images channel by channel.
                pixels = value.reshape(SIDE, SIDE, DEPTH, -1)
                value = pixels.transpose(2, 0, 1, 3).reshape(value.shape)
            axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
            prefix = layer.replace("_", ".")
            found[f"{prefix}.{_NAMES[name]}"] = value.transpose(axes)
            if name == "mean":
                found[f"{prefix}.num_batches_tracked"] = np.array(0)
    return found


def case(name: str, num_clients: int, rounds: int) -> round.Case:
    """What every rival trains.

    Args:
      name: of `NETWORKS`.
      num_clients: number of clients.
      rounds: with the one that is not counted.
    """
    network, width = NETWORKS[name]
    return round.Case(
        network=network,
        width=width,
        norm="batch",
        local=LOCAL,
        data=random_data.dataset(num_clients, LOCAL.steps * LOCAL.batch_size),
        model=round.initial(round.classifier_of(network, width, "batch")),
        rounds=rounds,
        state_dict=functools.partial(state_dict, network),
    )


def main() -> None:
    """Measure, compare, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one more")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    launch.prepare()
    parallel.make_devices(os.cpu_count() or 1)
    path = timing.RESULTS / "small.json"
    result = json.loads(path.read_text())["result"] if path.exists() else {}
    rows = []
    for network in args.networks:
        for clients in args.clients:
            one = case(network, clients, args.rounds + 1)
            found = round.measure(one, args.repeats)
            result[f"{network}, {clients} clients"] = found
            loop = found.get("PyTorch loop", found["mosaic_jax"])["seconds"]["median"]
            for name, measured in found.items():
                s = measured["seconds"]
                shown = f"{s['median']:.3f} ({s['low']:.3f} to {s['high']:.3f})"
                share = f"{s['median'] / loop:.2f}"
                rows.append((network, clients, name, shown, share))
    header = ["network", "clients", "", "s per round", "of the PyTorch loop"]
    print(timing.table(header, rows))
    timing.save("small", result)


if __name__ == "__main__":
    main()
