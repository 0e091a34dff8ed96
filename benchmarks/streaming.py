"""What it costs to keep training images in host memory, or in files.

    python -m benchmarks.streaming

Clients with 40 images of 32 x 32 x 3 each, of which 20 take part in a round: FedAvg of
an mlp-64, five local steps of 16 images, on one device. The set is one that TFDS has
prepared as ArrayRecord, of raw arrays. Prints, and writes to
benchmarks/results/streaming.json:

- seconds of a round with the images on the device, in host memory and in files, which
  take turns in one process, and their ratios;
- for two numbers of clients, peak memory of a fresh process that loads the set and runs
  two rounds, and the seconds that loading takes.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import random_data, timing
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from benchmarks.small import LOCAL
from mosaic_jax.cli import launch
from mosaic_jax.core import prng
from mosaic_jax.core.types import FederatedDataset
from mosaic_jax.data import federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.settings import Data
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.mlp import MLP
from mosaic_jax.run import environment
from mosaic_jax.stages.host_rounds import HostRounds
from mosaic_jax.stages.rounds import Rounds

SIZE, IN_ROUND = 40, 20
WHERE = ("device", "host", "files")


def prepare(folder: str, num_clients: int) -> None:
    """Write a set of random images as TFDS would, with one for each client to test."""
    import tensorflow_datasets as tfds

    core: Any = tfds.core  # declared loosely in the library itself
    images = random_data.dataset(num_clients, SIZE).images

    with core.registered.skip_registration():

        class Noise(tfds.core.GeneratorBasedBuilder):
            """Random images."""

            # Which TFDS looks for in a package: run as a program it would be in none.
            __module__ = "benchmarks.streaming"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Tensor(
                        shape=(SIDE, SIDE, DEPTH), dtype=np.uint8
                    ),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, _: Any) -> dict[str, Any]:
                count = len(images.label)
                return {"train": self._rows(count), "test": self._rows(num_clients)}

            def _generate_examples(self, *_: Any) -> Iterator[Any]:
                return iter(())

            def _rows(self, count: int) -> Iterator[Any]:
                for i in range(count):
                    yield i, {"image": images.image[i], "label": int(images.label[i])}

    Noise(data_dir=folder, file_format="array_record").download_and_prepare()


def load(folder: str, num_clients: int, where: str) -> StudyData:
    """The set, split evenly."""
    config = Data(
        name="tfds:noise",
        dir=folder,
        size=(SIDE, SIDE),
        split="iid",
        num_clients=num_clients,
        in_memory=where != "files",
    )
    return federated.load(config, 0)


def rounds_of(data: StudyData, where: str) -> Callable[[], Any]:
    """A call that runs the next round."""
    classifier = Classifier(MLP(CLASSES, width=64), data.info.mean, data.info.std)
    algorithm, clients = algorithms.FedAvg(), data.clients
    axis = parallel.build(np.asarray(clients.client.size), num_devices=1)
    rounds = Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(classifier, axis.num_clients, ()),
        local=LOCAL,
        axis=axis,
        augmentation="none",
        keep_models=False,
        clients_per_round=IN_ROUND,
    )
    key = prng.root(0)
    model = jax.jit(classifier.init, static_argnums=1)(key, data.info.image_shape)
    state, number = rounds.initial_state(model, key), 0
    if where == "device":
        placed = axis.place(clients, whole=True)
        step = jax.jit(rounds.run)
    else:
        placed = FederatedDataset((), axis.replicate(clients.client))
        step = HostRounds(rounds, clients).run

    def run() -> None:
        nonlocal state, number
        state, _, _ = jax.block_until_ready(step(placed, key, state, number))
        number += 1

    return run


def worker(folder: str, num_clients: int, where: str) -> None:
    """Of a fresh process: prints what loading and two rounds take, as JSON."""
    start = time.perf_counter()
    data = load(folder, num_clients, where)
    seconds = time.perf_counter() - start
    run = rounds_of(data, where)
    run()
    run()
    print(json.dumps({"load_seconds": seconds, "peak": environment.peak_memory()}))


def fresh(folder: str, num_clients: int, where: str) -> dict[str, float]:
    """What `worker` prints."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--worker", where]
    command += ["--folder", folder, "--clients", str(num_clients)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[250, 1000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", choices=WHERE, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    launch.prepare()
    if args.worker:
        worker(args.folder, args.clients[0], args.worker)
        return
    result: dict[str, Any] = {"memory": []}
    with tempfile.TemporaryDirectory() as root:
        for count in args.clients:
            folder = str(pathlib.Path(root) / str(count))
            prepare(folder, count)
            images = count * SIZE * SIDE * SIDE * DEPTH
            for where in WHERE[1:]:
                found = fresh(folder, count, where)
                row = {"clients": count, "where": where, "images": images} | found
                result["memory"].append(row)
        loaded = {where: load(folder, count, where) for where in WHERE}
        runs = {where: rounds_of(loaded[where], where) for where in WHERE}
        seconds = timing.take_turns(runs, args.repeats)
    first = np.median(seconds["device"])
    result["seconds"] = {where: timing.spread(seconds[where]) for where in WHERE}
    rows = [
        (
            where,
            f"{s['median']:.4f} ({s['low']:.4f} to {s['high']:.4f})",
            f"{s['median'] / first:.2f}",
        )
        for where, s in result["seconds"].items()
    ]
    print(timing.table(["images", "s per round", "of the device's"], rows))
    rows = [
        (
            row["clients"],
            row["where"],
            f"{row['images'] / 1e6:.0f}",
            f"{row['peak'] / 1e6:.0f}",
            f"{row['load_seconds']:.1f}",
        )
        for row in result["memory"]
    ]
    header = ["clients", "images", "MB of images", "peak MB", "s to load"]
    print(timing.table(header, rows))
    timing.save("streaming", result)


if __name__ == "__main__":
    main()
