"""What clients with narrower networks cost, as networks of their size and masked.

    python -m benchmarks.heterogeneous --width 16
    python -m benchmarks.heterogeneous --width 64 --repeats 3

A ResNet-18 (32 x 32 images, batch 64), ten clients, rounds of one and of three local
steps taking turns in one process; a step is half their difference, what is left of a
round is its fixed part (parts cut and averaged):

- full: FedAvg, every client holds all;
- grouped: HeteroFL, two clients at each of five rates, as networks of their own size;
- masked: the same clients with full-width networks that are 0 outside of their part;
- one row per rate: FedAvg with ten clients of that rate, for where the time goes.

Prints seconds of a step of all ten, its share of `full`'s and that of the FLOPs; writes
benchmarks/results/heterogeneous_WIDTH.json.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import random_data, timing
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core import prng
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.training import Local
from mosaic_jax.nn import resnet, submodel
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.rounds import Rounds

RATES = (1.0, 0.5, 0.25, 0.125, 0.0625)
NUM_CLIENTS = 10
STEPS = (1, 3)
LOCAL = Local(steps=1, batch_size=64, learning_rate=0.01, weight_decay=1e-4)
SHAPE = (SIDE, SIDE, DEPTH)


@dataclasses.dataclass(frozen=True)
class Masked(Algorithm):
    """A client's state is 1 where it holds the network."""

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The part among zeros; training keeps them zero."""
        return submodel.within(model, client_state)


def build(
    width: int, steps: int, algorithm: Algorithm, rates: tuple[float, ...] = ()
) -> Rounds:
    """Ten clients' rounds.

    Args:
      width: of the network.
      steps: of a round.
      algorithm: of the rounds.
      rates: of the clients; (): all hold the whole network.
    """
    module = resnet.ResNet(CLASSES, width=width)
    classifier = Classifier(module, (0.5,) * DEPTH, (0.25,) * DEPTH)
    return Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(classifier, NUM_CLIENTS, rates),
        local=dataclasses.replace(LOCAL, steps=steps),
        axis=parallel.build(random_data.dataset(NUM_CLIENTS, 128).client.size),
        augmentation="crop_flip",
        keep_models=False,
    )


def program(rounds: Rounds, state: Tree = None) -> Callable[[], Tree]:
    """A call that runs the next round, with clients' `state` where it is given."""
    data = rounds.axis.place(random_data.dataset(NUM_CLIENTS, 128), whole=True)
    classifier = rounds.holdings.classifier
    model = jax.jit(lambda key: classifier.init(key, SHAPE))(prng.root(1))
    start = rounds.initial_state(model, prng.root(0))
    if state is not None:
        start = start.replace(client=state)
    step = jax.jit(functools.partial(rounds.run, data, prng.root(0)))
    current = start

    def run() -> Tree:
        nonlocal current
        current = jax.block_until_ready(step(current, jnp.zeros((), jnp.int32))[0])
        return current

    return run


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    launch.prepare()
    heterofl = algorithms.HeteroFL(batch_norm="running", scaler=False)
    each = tuple(rate for rate in RATES for _ in range(NUM_CLIENTS // len(RATES)))
    mixed = build(args.width, 1, heterofl, each).holdings
    flops = {rate: mixed.classifier_of(rate).flops(SHAPE) for rate in RATES}
    model = mixed.classifier.init(prng.root(1), SHAPE)
    client = jax.tree.map(jnp.asarray, random_data.dataset(NUM_CLIENTS, 128).client)
    share = mixed.share_of_all(model, client, prng.root(0), 0)
    rivals = {}
    for steps in STEPS:
        start = functools.partial(build, args.width, steps)
        rivals["full", steps] = program(start(algorithms.FedAvg()))
        rivals["grouped", steps] = program(start(heterofl, each))
        rivals["masked", steps] = program(start(Masked()), share)
        for rate in RATES[1:]:
            alone = start(heterofl, (rate,) * NUM_CLIENTS)
            rivals[f"all at {rate}", steps] = program(alone)
    seconds = timing.take_turns(rivals, args.repeats)
    mean = sum(flops[rate] for rate in each) / NUM_CLIENTS
    work = {"full": 1.0, "grouped": mean / flops[1.0], "masked": mean / flops[1.0]}
    work |= {f"all at {rate}": flops[rate] / flops[1.0] for rate in RATES[1:]}
    few, many = STEPS
    cells = {}
    for name in work:
        pairs = zip(seconds[name, few], seconds[name, many], strict=True)
        cells[name] = timing.spread([(b - a) / (many - few) for a, b in pairs])
        cells[name]["fixed"] = (
            timing.spread(seconds[name, few])["median"] - few * cells[name]["median"]
        )
    full = cells["full"]["median"]
    rows = [
        (
            name,
            f"{cell['median']:.3f} ({cell['low']:.3f} to {cell['high']:.3f})",
            f"{cell['fixed']:.3f}",
            f"{cell['median'] / full:.3f}",
            f"{work[name]:.3f}",
            f"{cell['median'] / full / work[name]:.2f}",
        )
        for name, cell in cells.items()
    ]
    header = [
        "clients",
        "s per step",
        "s fixed",
        "of full's time",
        "of full's FLOPs",
        "ratio",
    ]
    print(timing.table(header, rows))
    result = {"rates": each, "seconds": cells, "flops_share": work}
    timing.save(f"heterogeneous_{args.width}", result)


if __name__ == "__main__":
    main()
