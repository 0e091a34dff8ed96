"""A federated round against a PyTorch loop, pfl and Flower, side by side.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.round --norm group
    python -m benchmarks.round --norm batch

Ten clients, ten local SGD steps of 64 images each, FedAvg: every rival gets the same
initial weights, images, batch order and number of samples, and their final weights are
compared with those of the PyTorch loop. Flower and pfl run as their documentation
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
import torch

from benchmarks import random_data, rivals, timing, torch_models
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax import algorithms, cli, parallel, prng, training, trees
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import augment
from mosaic_jax.models import resnet
from mosaic_jax.settings import Local
from mosaic_jax.stages.rounds import Rounds
from mosaic_jax.types import Client, FederatedDataset, ModelState

CLIENTS, STEPS, BATCH = 10, 10, rivals.BATCH
SIZE = STEPS * BATCH
LOCAL = Local(
    steps=STEPS,
    batch_size=BATCH,
    learning_rate=rivals.LEARNING_RATE,
    weight_decay=rivals.WEIGHT_DECAY,
)
KEY = prng.root(0)


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
    """Seconds of each round, and the final global model."""
    axis = parallel.build(data.client.size, num_devices=1)
    placed = axis.place(data)
    rounds_of = Rounds(
        classifier=classifier,
        algorithm=algorithms.FedAvg(),
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


def as_tensors(data: FederatedDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, normalised as the classifier does, and labels."""
    image = np.asarray(augment.to_signed(data.images.image))
    image = ((image + 1) / 2 - 0.5) / 0.25
    return torch_models.batch(image), torch.tensor(data.images.label).long()


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
    cli.prepare()
    rounds = args.rounds + 1
    data = random_data.dataset(CLIENTS, SIZE)
    classifier = Classifier(
        resnet.ResNet(CLASSES, width=rivals.WIDTH, norm=args.norm),
        (0.5,) * DEPTH,
        (0.25,) * DEPTH,
    )
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(jax.random.key(1), (SIDE, SIDE, DEPTH))
    weights = {
        name: torch.tensor(value)
        for name, value in torch_models.state_dict(model).items()
    }
    order, tensors = batch_order(data, rounds), as_tensors(data)
    seconds: dict[str, list[float]] = {
        "mosaic_jax": [],
        **{n: [] for n in rivals.RIVALS},
    }
    final = {}
    for _ in range(args.repeats):
        found, ours = run_ours(classifier, model, data, rounds)
        seconds["mosaic_jax"] += found[1:]
        final["mosaic_jax"] = torch_models.state_dict(ours)
        for name, run in rivals.RIVALS.items():
            found, final[name] = run(weights, args.norm, tensors, order)
            seconds[name] += found[1:]
    ours = timing.spread(seconds["mosaic_jax"])["median"]
    result, rows = {}, []
    for name, values in seconds.items():
        found = timing.spread(values)
        gap = distance(final["PyTorch loop"], final[name])
        result[name] = {"seconds": found, "distance_from_pytorch_loop": gap}
        shown = f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        rows.append((name, shown, f"{ours / found['median']:.2f}", f"{gap:.1e}"))
    header = ["", "s per round", "mosaic_jax / this", "weights differ by"]
    print(timing.table(header, rows))
    timing.save(f"round_{args.norm}", result)


if __name__ == "__main__":
    main()
