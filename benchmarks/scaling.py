"""What more clients and more devices cost.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --clients 10,100 --devices 1,2

A FedAvg round of a width-16 ResNet-18 (two local steps of 16 images, 32 x 32) over the
same 10,000 images, dealt to 1 up to 1,000 clients. Prints, and writes to
benchmarks/results/scaling.json:

- time per client, the client counts taking turns in one process;
- peak memory of a fresh process that runs two rounds, and of the compiled program;
- time per client over the cores of this machine forced into 1 up to 8 devices, and how
  far the resulting weights are from those of one device;
- padding waste of the GAN stage for the published CIFAR-10 split (72 to 9,999 images):
  samples processed for each that counts, by lanes and devices.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_data, timing
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core import prng
from mosaic_jax.core.types import FederatedDataset, ServerState
from mosaic_jax.data import partition
from mosaic_jax.fl import algorithms, parallel, schedule, training
from mosaic_jax.fl.training import Local
from mosaic_jax.nn import resnet
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run import environment
from mosaic_jax.stages.rounds import Rounds

IMAGES = 10_000
LOCAL = Local(steps=2, batch_size=16, learning_rate=0.01, weight_decay=1e-4)
GAN_EPOCHS, GAN_BATCH, EVERY = 200, 64, 50


def federated_round(num_clients: int) -> tuple[Callable[[], ServerState], int]:
    """A call that runs the next round on all devices, and the program's bytes."""
    classifier = Classifier(
        resnet.ResNet(CLASSES, width=16), (0.5,) * DEPTH, (0.25,) * DEPTH
    )
    data = random_data.dataset(num_clients, IMAGES // num_clients)
    algorithm = algorithms.FedAvg()
    axis = parallel.build(data.client.size)
    placed = axis.place(data)
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(prng.root(1), (SIDE, SIDE, DEPTH))
    rounds = Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(classifier, num_clients, ()),
        local=LOCAL,
        axis=axis,
        augmentation="crop_flip",
        keep_models=False,
    )
    state = axis.replicate(jax.device_get(rounds.initial_state(model, prng.root(0))))

    @functools.partial(jax.jit, donate_argnums=1)
    def program(data: FederatedDataset, state: ServerState, number: jax.Array):
        return rounds.run(data, prng.root(0), state, number)[0]

    number = jnp.zeros((), jnp.int32)
    compiled = program.lower(placed, state, number).compile()
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes

    def run() -> ServerState:
        nonlocal state
        state = jax.block_until_ready(compiled(placed, state, number))
        return state

    return run, used


def worker(num_clients: int, weights: str) -> None:
    """Of a fresh process: two rounds; prints what they took as JSON.

    The parameters after the first round go to the file `weights`.
    """
    run, used = federated_round(num_clients)
    leaves = jax.tree.leaves(run().model.params)
    np.save(weights, np.concatenate([np.asarray(leaf).ravel() for leaf in leaves]))
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = environment.peak_memory()
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "program_bytes": used}))


def fresh(num_clients: int, num_devices: int = 1) -> tuple[dict, np.ndarray]:
    """What `worker` prints, and the parameters that it saves."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.npy"
        module = [sys.executable, "-m", "benchmarks.scaling"]
        done = subprocess.run(
            [*module, "--worker", str(num_clients), "--weights", weights],
            env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1]), np.load(weights)


def published_sizes() -> np.ndarray:
    """Images of the ten clients in the published CIFAR-10 split."""
    labels = np.repeat(np.arange(CLASSES), 5000)
    parts = partition.split(
        labels, mode="dirichlet_unbalanced", num_clients=10, alpha=0.01, seed=5363
    )
    return np.array([len(part) for part in parts])


def padding_waste(at_once: int, num_devices: int) -> float:
    """Samples processed for each image of each epoch, in the published split."""
    size = published_sizes()
    each = -(-len(size) // num_devices)
    at_once = schedule.balanced(each, at_once)
    slots = schedule.deal(size, num_devices, -(-each // at_once) * at_once)
    axis = parallel.ClientAxis(None, slots, at_once)
    steps = GAN_EPOCHS * np.asarray(training.steps_per_epoch(size, GAN_BATCH))
    processed = axis.plan(steps, EVERY).processed * GAN_BATCH
    return processed / float(GAN_EPOCHS * size.sum())


def by_clients(counts: list[int], repeats: int) -> list[dict]:
    """Time and memory for each number of clients."""
    rounds = {str(count): federated_round(count)[0] for count in counts}
    seconds = timing.take_turns(rounds, repeats)
    cells = []
    for count in counts:
        each = timing.spread([1e3 * s / count for s in seconds[str(count)]])
        cells.append({"clients": count, "ms_per_client": each, **fresh(count)[0]})
    print(
        timing.table(
            ["clients", "ms per client and round", "peak MB", "program MB"],
            [
                (
                    cell["clients"],
                    f"{cell['ms_per_client']['median']:.1f}"
                    f" ({cell['ms_per_client']['low']:.1f} to"
                    f" {cell['ms_per_client']['high']:.1f})",
                    f"{cell['peak_bytes'] / 1e6:.0f}",
                    f"{cell['program_bytes'] / 1e6:.0f}",
                )
                for cell in cells
            ],
        )
    )
    return cells


def by_devices(counts: list[int], num_clients: int = 20) -> list[dict]:
    """Time for each number of devices that share this machine's cores."""
    cells, reference = [], None
    for count in counts:
        found, weights = fresh(num_clients, count)
        reference = weights if reference is None else reference
        gap = float(np.abs(weights - reference).max() / np.abs(reference).max())
        cells.append({"devices": count, "relative_gap": gap, **found})
    print(
        timing.table(
            ["devices", "ms per client and round", "weights differ by"],
            [
                (
                    cell["devices"],
                    f"{1e3 * cell['seconds'] / num_clients:.1f}",
                    f"{cell['relative_gap']:.0e}",
                )
                for cell in cells
            ],
        )
    )
    return cells


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", default="1,10,100,1000")
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    launch.prepare()
    if args.worker:
        worker(args.worker, args.weights)
        return
    waste = [
        {"lanes": lanes, "devices": n, "padding_waste": padding_waste(lanes, n)}
        for lanes in (1, 10)
        for n in (1, 2, 4, 8)
    ]
    header = ["clients at once", "devices", "padding waste"]
    rows = [(w["lanes"], w["devices"], f"{w['padding_waste']:.3f}") for w in waste]
    size = published_sizes()
    naive = float(len(size) * size.max() / size.sum())
    print(timing.table(header, [*rows, ("a vmap over all", 1, f"{naive:.3f}")]))
    result = {
        "clients": by_clients([int(n) for n in args.clients.split(",")], args.repeats),
        "devices": by_devices([int(n) for n in args.devices.split(",")]),
        "padding": waste,
        "padding_of_a_vmap": naive,
    }
    timing.save("scaling", result)


if __name__ == "__main__":
    main()
