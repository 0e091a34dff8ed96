"""A federated round against a PyTorch loop, pfl and Flower, side by side.

    python -m benchmarks.environments
    python -m benchmarks.round --norm group
    python -m benchmarks.round --norm batch

Ten clients, ten local SGD steps of 64 images each, FedAvg: every rival gets the same
initial weights, images, batch order and number of samples, and their final weights are
compared with those of the PyTorch loop. Each rival runs in an environment and a process
of its own, which the first command makes. Flower and pfl run as their documentation
advises for one machine: pfl in one process with its simulated back end, Flower with one
actor per core and one thread each, data kept by the actors. We run on one device, and
on as many as there are cores (`compute.devices`). Prints seconds per round (median, low
to high, after one round that is not counted) and the ratio to `mosaic_jax`; writes
benchmarks/results/round_NORM.json.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environments, random_data, timing, worker
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core import prng
from mosaic_jax.core.types import Client, FederatedDataset, ModelState
from mosaic_jax.data import augment
from mosaic_jax.fl import algorithms, parallel, training
from mosaic_jax.fl.training import Local
from mosaic_jax.interop import torch as interop
from mosaic_jax.nn import networks
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.rounds import Rounds

CLIENTS, STEPS, BATCH, WIDTH = 10, 10, 64, 16
LOCAL = Local(steps=STEPS, batch_size=BATCH, learning_rate=0.01, weight_decay=1e-4)
SEED = 0
# Names in the table to environments.
RIVALS = {"PyTorch loop": "torch", "pfl": "pfl", "Flower": "flower"}
WEIGHTS = "weights/"
# Of weights after a few rounds: rounding that batch-norm amplifies stays far below.
MAX_DISTANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """What every rival trains.

    Attributes:
      network: of `torch_models.build`, which is also its name here.
      width: of it.
      norm: "batch" or "group".
      local: the clients' SGD.
      data: of the clients, each with the images of one round.
      model: global, before the first round.
      rounds: number of rounds; the first is not counted.
      state_dict: from a model to its weights by the names of `torch_models`.
    """

    network: str
    width: int
    norm: str
    local: Local
    data: FederatedDataset
    model: ModelState
    rounds: int
    state_dict: Callable[[ModelState], dict[str, np.ndarray]]

    @property
    def classifier(self) -> Classifier:
        """Of the clients."""
        return classifier_of(self.network, self.width, self.norm)


def classifier_of(network: str, width: int, norm: str) -> Classifier:
    """That of a case.

    Args:
      network: of `networks.NETWORKS`.
      width: of it.
      norm: of it; one without norms ignores it.
    """
    norm = {} if network == "mlp" else {"norm": norm}
    module = networks.build_classifier(
        network, CLASSES, (SIDE, SIDE, DEPTH), width=width, **norm
    )
    return Classifier(module, (0.5,) * DEPTH, (0.25,) * DEPTH)


def initial(classifier: Classifier) -> ModelState:
    """The global model before the first round."""
    init = jax.jit(classifier.init, static_argnums=1)
    return init(jax.random.key(1), (SIDE, SIDE, DEPTH))


def batch_order(case: Case) -> np.ndarray:
    """Image numbers [rounds, clients, images] in the order in which we use them."""
    local = case.local

    @jax.jit
    @jax.vmap
    def order(client: Client) -> jax.Array:
        rows, _ = training.client_rows(
            client,
            0,
            case.rounds * local.steps,
            key=prng.root(SEED),
            batch_size=local.batch_size,
        )
        return rows.reshape(case.rounds, -1)

    return np.asarray(order(case.data.client)).swapaxes(0, 1)


def run_ours(case: Case, num_devices: int) -> tuple[list[float], ModelState]:
    """Run the rounds by this library.

    Returns:
      Seconds of each round, and the final global model.
    """
    algorithm, size = algorithms.FedAvg(), case.data.client.size
    axis = parallel.build(size, num_devices=num_devices)
    rounds_of = Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(case.classifier, len(size), ()),
        local=case.local,
        axis=axis,
        augmentation="none",
        keep_models=False,
    )
    program = jax.jit(rounds_of.run, donate_argnames="state")
    state = jax.tree.map(jnp.copy, rounds_of.initial_state(case.model, prng.root(SEED)))
    placed = axis.place(case.data)
    key, state = axis.replicate((prng.root(SEED), state))
    seconds = []
    for number in axis.replicate(list(np.arange(case.rounds))):
        start = time.perf_counter()
        state, _, _ = jax.block_until_ready(program(placed, key, state, number))
        seconds.append(time.perf_counter() - start)
    return seconds, state.model


def for_rivals(case: Case) -> dict[str, np.ndarray]:
    """What `rivals.run` takes: images are normalised as the classifier does."""
    data = case.data
    image = np.asarray(augment.to_signed(data.images.image))
    image = ((image + 1) / 2 - 0.5) / 0.25
    return {
        "image": np.ascontiguousarray(np.moveaxis(image, -1, 1)),
        "label": data.images.label,
        "order": batch_order(case),
        **{
            WEIGHTS + name: value for name, value in case.state_dict(case.model).items()
        },
    }


def run_rival(
    environment: str, arrays: dict[str, np.ndarray], case: Case
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Run the rounds by a rival.

    Args:
      environment: of `RIVALS`.
      arrays: of `for_rivals`.
      case: that they are of.

    Returns:
      Seconds of each round, and the final weights.
    """
    with worker.Worker(environment, "benchmarks.rivals") as rival:
        found = rival.call(
            "run",
            arrays,
            rival=environment,
            network=case.network,
            norm=case.norm,
            width=case.width,
            batch_size=case.local.batch_size,
            learning_rate=case.local.learning_rate,
            weight_decay=case.local.weight_decay,
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


def measure(case: Case, repeats: int) -> dict[str, dict]:
    """Seconds of a round (their `timing.spread`) and final weights' distance, by rival.

    Rivals take turns. Those whose environment is missing are left out.

    Raises:
      AssertionError: the weights of one are not those of the PyTorch loop.
    """
    cores = os.cpu_count() or 1
    ours = {"mosaic_jax": 1, f"mosaic_jax, {cores} devices": cores}
    rivals = {n: one for n, one in RIVALS.items() if environments.is_ready(one)}
    arrays = for_rivals(case)
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, *rivals)}
    final = {}
    for _ in range(repeats):
        for name, num_devices in ours.items():
            found, model = run_ours(case, num_devices)
            seconds[name] += found[1:]
            final[name] = case.state_dict(model)
        for name, environment in rivals.items():
            found, final[name] = run_rival(environment, arrays, case)
            seconds[name] += found[1:]
    truth = final.get("PyTorch loop", final["mosaic_jax"])
    gaps = {name: distance(truth, weights) for name, weights in final.items()}
    for name, gap in gaps.items():
        if not gap < MAX_DISTANCE:
            raise AssertionError(f"{name}: weights differ from PyTorch's by {gap:.1e}")
    return {
        name: {
            "seconds": timing.spread(values),
            "distance_from_pytorch_loop": gaps[name],
        }
        for name, values in seconds.items()
    }


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
    parallel.make_devices(os.cpu_count() or 1)
    case = Case(
        network="resnet18",
        width=WIDTH,
        norm=args.norm,
        local=LOCAL,
        data=random_data.dataset(CLIENTS, STEPS * BATCH),
        model=initial(classifier_of("resnet18", WIDTH, args.norm)),
        rounds=args.rounds + 1,
        state_dict=state_dict,
    )
    result = measure(case, args.repeats)
    ours = result["mosaic_jax"]["seconds"]["median"]
    rows = []
    for name, found in result.items():
        time_, gap = found["seconds"], found["distance_from_pytorch_loop"]
        shown = f"{time_['median']:.2f} ({time_['low']:.2f} to {time_['high']:.2f})"
        rows.append((name, shown, f"{ours / time_['median']:.2f}", f"{gap:.1e}"))
    header = ["", "s per round", "mosaic_jax / this", "weights differ by"]
    print(timing.table(header, rows))
    timing.save(f"round_{args.norm}", result)


if __name__ == "__main__":
    main()
