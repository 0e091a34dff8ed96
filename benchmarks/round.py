"""A federated round against a PyTorch loop, pfl and Flower, side by side.

    python -m benchmarks.environments
    python -m benchmarks.round --norm group
    python -m benchmarks.round --norm batch

Ten clients, ten local SGD steps of 64 images each, FedAvg: every rival gets the same
initial weights, images, batch order and number of samples, and their final weights are
compared with those of the PyTorch loop. Each rival runs in an environment and a process
of its own, which the first command makes. Flower and pfl run as their documentation
advises for one machine: pfl in one process with its simulated back end, Flower with one
actor per core and one thread each, data kept by the actors. Prints seconds per round
(median, low to high, after one round that is not counted) and the ratio to
`mosaic_jax`; writes benchmarks/results/round_NORM.json.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_data, timing, worker
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Client, FederatedDataset, ModelState
from mosaic_jax.data import augment
from mosaic_jax.fl import algorithms, parallel, training
from mosaic_jax.fl.training import Local
from mosaic_jax.interop import torch as interop
from mosaic_jax.nn import resnet
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.rounds import Rounds

CLIENTS, STEPS, BATCH, WIDTH = 10, 10, 64, 16
SIZE = STEPS * BATCH
LOCAL = Local(steps=STEPS, batch_size=BATCH, learning_rate=0.01, weight_decay=1e-4)
KEY = prng.root(0)
# Names in the table to environments.
RIVALS = {"PyTorch loop": "torch", "pfl": "pfl", "Flower": "flower"}
WEIGHTS = "weights/"
# Of weights after a few rounds: rounding that batch-norm amplifies stays far below.
MAX_DISTANCE = 0.01


def batch_order(data: FederatedDataset, rounds: int) -> np.ndarray:
    """Image numbers [rounds, clients, SIZE] in the order in which we use them."""

    @jax.jit
    def order(client: Client) -> jax.Array:
        rows, _ = training.client_rows(
            client, 0, rounds * STEPS, key=KEY, batch_size=BATCH
        )
        return rows.reshape(rounds, SIZE)

    clients = [trees.take(data.client, i) for i in range(CLIENTS)]
    return np.stack([np.asarray(order(client)) for client in clients], axis=1)


def run_ours(
    classifier: Classifier, model: ModelState, data: FederatedDataset, rounds: int
) -> tuple[list[float], ModelState]:
    """Run the rounds by this library.

    Args:
      classifier: of the clients.
      model: global, before the first round.
      data: of the clients.
      rounds: how many.

    Returns:
      Seconds of each round, and the final global model.
    """
    algorithm = algorithms.FedAvg()
    axis = parallel.build(data.client.size, num_devices=1)
    placed = axis.place(data)
    rounds_of = Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(classifier, CLIENTS, ()),
        local=LOCAL,
        axis=axis,
        augmentation="none",
        keep_models=False,
    )
    program = jax.jit(rounds_of.run, donate_argnames="state")
    state = jax.tree.map(jnp.copy, rounds_of.initial_state(model, KEY))
    seconds = []
    for number in range(rounds):
        start = time.perf_counter()
        state, _, _ = jax.block_until_ready(program(placed, KEY, state, number))
        seconds.append(time.perf_counter() - start)
    return seconds, state.model


def for_rivals(
    model: ModelState, data: FederatedDataset, order: np.ndarray
) -> dict[str, np.ndarray]:
    """What `rivals.run` takes: images are normalised as the classifier does.

    Args:
      model: global, before the first round.
      data: of the clients.
      order: of `batch_order`.
    """
    image = np.asarray(augment.to_signed(data.images.image))
    image = ((image + 1) / 2 - 0.5) / 0.25
    return {
        "image": np.ascontiguousarray(np.moveaxis(image, -1, 1)),
        "label": data.images.label,
        "order": order,
        **{WEIGHTS + name: value for name, value in state_dict(model).items()},
    }


def run_rival(
    environment: str, arrays: dict[str, np.ndarray], norm: str
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Run the rounds by a rival.

    Args:
      environment: of `RIVALS`.
      arrays: of `for_rivals`.
      norm: of the network.

    Returns:
      Seconds of each round, and the final weights.
    """
    with worker.Worker(environment, "benchmarks.rivals") as rival:
        found = rival.call(
            "run",
            arrays,
            rival=environment,
            norm=norm,
            width=WIDTH,
            batch_size=LOCAL.batch_size,
            learning_rate=LOCAL.learning_rate,
            weight_decay=LOCAL.weight_decay,
        )
    seconds = found.pop("seconds").tolist()
    return seconds, {n.removeprefix(WEIGHTS): value for n, value in found.items()}


def state_dict(model: ModelState) -> dict[str, np.ndarray]:
    """The published names of our ResNet-18's variables, group-norm or batch-norm."""
    variables = dict(model.variables)
    if not model.batch_stats:
        variables["batch_stats"] = _absent_statistics(model.params)
    found = interop.save("resnet18", variables)
    kept = ("running_mean", "running_var", "num_batches_tracked")
    if model.batch_stats:
        return found
    return {name: v for name, v in found.items() if not name.endswith(kept)}


def _absent_statistics(params: dict) -> dict:
    if "scale" in params:
        return {"mean": np.zeros(len(params["scale"])), "var": np.ones(1)}
    return {k: _absent_statistics(v) for k, v in params.items() if isinstance(v, dict)}


def distance(a: dict, b: dict) -> float:
    """Largest difference of trained parameters, relative to the largest parameter."""
    names = [n for n in a if "running" not in n and "num_batches" not in n]
    gap = max(float(np.abs(np.asarray(a[n]) - np.asarray(b[n])).max()) for n in names)
    return gap / max(float(np.abs(np.asarray(a[n])).max()) for n in names)


def main() -> None:
    """Measure, compare, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--norm", choices=("batch", "group"), default="group")
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one more")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    launch.prepare()
    rounds = args.rounds + 1
    data = random_data.dataset(CLIENTS, SIZE)
    classifier = Classifier(
        resnet.ResNet(CLASSES, width=WIDTH, norm=args.norm),
        (0.5,) * DEPTH,
        (0.25,) * DEPTH,
    )
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(jax.random.key(1), (SIDE, SIDE, DEPTH))
    arrays = for_rivals(model, data, batch_order(data, rounds))
    seconds: dict[str, list[float]] = {name: [] for name in ("mosaic_jax", *RIVALS)}
    final = {}
    for _ in range(args.repeats):
        found, ours = run_ours(classifier, model, data, rounds)
        seconds["mosaic_jax"] += found[1:]
        final["mosaic_jax"] = state_dict(ours)
        for name, environment in RIVALS.items():
            found, final[name] = run_rival(environment, arrays, args.norm)
            seconds[name] += found[1:]
    ours = timing.spread(seconds["mosaic_jax"])["median"]
    result, rows = {}, []
    for name, values in seconds.items():
        found = timing.spread(values)
        gap = distance(final["PyTorch loop"], final[name])
        if not gap < MAX_DISTANCE:
            raise AssertionError(f"{name}: weights differ from PyTorch's by {gap:.1e}")
        result[name] = {"seconds": found, "distance_from_pytorch_loop": gap}
        shown = f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        rows.append((name, shown, f"{ours / found['median']:.2f}", f"{gap:.1e}"))
    header = ["", "s per round", "mosaic_jax / this", "weights differ by"]
    print(timing.table(header, rows))
    timing.save(f"round_{args.norm}", result)


if __name__ == "__main__":
    main()
