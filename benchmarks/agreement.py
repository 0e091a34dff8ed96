"""Four algorithms beside the ones of pfl and fluke: accuracy, weights and seconds.

    python -m benchmarks.environments pfl fluke
    taskset -c 0 python -m benchmarks.agreement --name digits --rounds 50
    taskset -c 0 python -m benchmarks.agreement --name fashion_mnist --rounds 25

100 clients, of whom 10 train in a round; alpha 0.1. FedAvg, SCAFFOLD, FedAdam and MOON
run as studies of this library, and as the peers' own classes in environments of their
own, which get the same images, split, initial model, clients of each round and
minibatches. Where a peer defines an algorithm otherwise, ours runs a second time with
the peer's definition (benchmarks/as_peers.py): these weights must be the peer's but for
rounding, which is looked at after a few rounds.

Prints, for each algorithm and peer, test accuracy after the last round (mean and
standard deviation over seeds, per cent); of the same definition, whether the means
differ by no more than the larger of the two deviations, and the largest difference of
weights; and the median seconds of a round, after one that is not counted. These are the
processor's, so that other programs do not count: on one core, which `taskset` sees to,
those of a quiet machine, from runs of any length. Keeps what it measured in
benchmarks/results/agreement_NAME.json, where several commands may add seeds.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mosaic_jax as mj
from benchmarks import as_peers, round, small, timing, worker
from mosaic_jax.cli import launch
from mosaic_jax.core import prng
from mosaic_jax.core.types import ModelState
from mosaic_jax.data import augment
from mosaic_jax.fl import algorithms, training
from mosaic_jax.run import study as studies
from mosaic_jax.run.placement import Placement
from mosaic_jax.run.settings import Settings
from mosaic_jax.stages import federation
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.rounds import Rounds

CLIENTS, IN_ROUND, ALPHA, WIDTH = 100, 10, 0.1, 4
# Rounds after which weights are compared: clients have come back, with what they kept.
CHECKED = 5
# Rounds of ours that are timed, after one more.
TIMED = 20
# Relative to the largest weight. Rounding grows where a ReLU flips, which it does for
# all pixels of a black background at once: in five rounds from 1e-7 to 1e-2.
MAX_DISTANCE = 0.02
# Every algorithm as the library has it.
OURS: dict[str, mj.Algorithm] = {
    "fedavg": algorithms.FedAvg(),
    "scaffold": algorithms.Scaffold(option="II"),
    "fedadam": algorithms.FedAdam(server_learning_rate=0.01),
    "moon": algorithms.Moon(),
}
NAMES = {
    "fedavg": "FedAvg",
    "scaffold": "SCAFFOLD",
    "fedadam": "FedAdam",
    "moon": "MOON",
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An algorithm and a peer that has it.

    Attributes:
      name: of the algorithm, in `OURS`.
      peer: of `peers.PEERS`.
      as_peer: ours with the peer's definition; None: the definitions are the same.
      told: what differs, in a line.
    """

    name: str
    peer: str
    as_peer: mj.Algorithm | None = None
    told: str = ""


PAIRS = (
    Pair("fedavg", "pfl"),
    Pair("fedavg", "fluke"),
    Pair(
        "scaffold",
        "pfl",
        as_peers.OppositeScaffold(option="II"),
        "pfl 0.6.0 has c_i with the opposite sign of the paper's, and the paper's"
        " correction g - c_i + c, so that drift is added where it should be removed;"
        " clients count alike",
    ),
    Pair(
        "scaffold",
        "fluke",
        as_peers.UniformScaffold(option="II"),
        "clients count alike, here by their images",
    ),
    Pair("fedadam", "pfl"),
    Pair(
        "fedadam",
        "fluke",
        as_peers.PlainFedAdam(server_learning_rate=0.01),
        "fluke does not correct the first rounds' moments; its tau counts as tau /"
        " server rate, and is set to be the same",
    ),
    Pair(
        "moon",
        "fluke",
        as_peers.MoonFromReceived(),
        "before a client's first round, fluke contrasts with the model that it"
        " receives, here with the initial one; pfl has no MOON",
    ),
)


def settings_of(name: str, seed: int, rounds: int, algorithm: mj.Algorithm) -> Settings:
    """A study of `algorithm`.

    Args:
      name: "digits" or "fashion_mnist", 6,000 of its images.
      seed: of the study.
      rounds: federated rounds.
      algorithm: of the clients and the server.
    """
    config = mj.configs.get("digits_mosaic", method="federated", seed=seed)
    config.data.name = name
    config.data.max_images = 6000 if name == "fashion_mnist" else 0
    config.data.validation = 0.0
    config.data.num_clients = CLIENTS
    # Each client has an image or more; the number of images differs as the classes do.
    config.data.split = "dirichlet_mixed"
    config.data.iid_share = 0.1
    config.data.alpha = ALPHA
    config.model.name, config.model.width, config.model.norm = "cnn", WIDTH, "group"
    config.local.steps, config.local.batch_size = 5, 16
    config.local.learning_rate = 0.05
    config.init.rounds, config.finetune.rounds = rounds, 0
    config.init.clients_per_round = IN_ROUND
    config.evaluation.every = CHECKED
    config.log.trackers = ()
    return mj.Study(config, algorithm=algorithm).settings


class Keep(mj.Callback):
    """Holds the global model after `CHECKED` rounds."""

    model: ModelState | None = None

    def on_round_end(self, state: mj.Round) -> None:
        """Copy it, if it is time."""
        if state.number == CHECKED:
            self.model = jax.device_get(state.model)


def run_ours(config: Settings) -> tuple[float, dict[str, np.ndarray]]:
    """Accuracy of a study on its test images, and its weights after `CHECKED` rounds.

    Args:
      config: of `settings_of`.
    """
    kept = Keep()
    with tempfile.TemporaryDirectory() as folder:
        result = mj.Study(config, folder, callbacks=[kept]).run()
        accuracy = result.summary.test_accuracy["final"]
    assert kept.model is not None
    return accuracy, small.state_dict("cnn", kept.model)


def opened(study: studies.Study) -> tuple[Context, Rounds, ModelState]:
    """The context and the program of a study's rounds, and the initial model."""
    link = study.chain[0]
    context = Placement(study).context(link)
    init = jax.jit(context.classifier.init, static_argnums=1)
    model = init(prng.named(context.key, "model"), context.data.info.image_shape)
    return context, federation.build(context, study.settings.local), model


def time_rounds(study: studies.Study) -> list[float]:
    """Seconds of the processor of each of `TIMED` rounds, after one more."""
    context, rounds, model = opened(study)
    key = federation.rounds_key(study.settings)
    program = jax.jit(rounds.run, donate_argnames="state")
    state = jax.tree.map(jnp.copy, rounds.initial_state(model, key))
    seconds = []
    for number in rounds.axis.replicate(list(np.arange(TIMED + 1))):
        start = time.process_time()
        state = jax.block_until_ready(program(context.clients, key, state, number)[0])
        seconds.append(time.process_time() - start)
    return seconds[1:]


def for_peers(study: studies.Study) -> dict[str, np.ndarray]:
    """What `peers.run` takes: images are normalised as the classifier does."""
    context, rounds, model = opened(study)
    settings, data = study.settings, study.data
    key, local = federation.rounds_key(settings), settings.local

    @jax.jit
    def turns(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (who,) = rounds.participation.participants(key, number)
        client = jax.tree.map(lambda leaf: jnp.asarray(leaf)[who], data.clients.client)
        rows, mask = jax.vmap(
            lambda one: training.client_rows(
                one,
                number * local.steps,
                local.steps,
                key=key,
                batch_size=local.batch_size,
            )
        )(client)
        return who, rows, mask

    every = [turns(number) for number in np.arange(settings.init.rounds)]
    who, rows, mask = (np.stack(part) for part in zip(*every, strict=True))

    def normalised(image: np.ndarray) -> np.ndarray:
        signed = augment.to_signed(np.asarray(image))
        found = np.asarray(context.classifier.normalise(signed))
        return np.ascontiguousarray(np.moveaxis(found, -1, 1))

    test = data.held_out["test"]
    return {
        "image": normalised(data.clients.images.image),
        "label": np.asarray(data.clients.images.label),
        "test_image": normalised(test.image),
        "test_label": np.asarray(test.label),
        "size": np.asarray(data.clients.client.size),
        "who": who,
        "rows": rows,
        "mask": mask,
        **{
            round.WEIGHTS + name: value
            for name, value in small.state_dict("cnn", model).items()
        },
    }


def measure(
    name: str, seed: int, rounds: int, workers: Mapping[str, worker.Worker]
) -> Iterator[dict[str, Any]]:
    """Of each pair: accuracies, seconds, and the difference of weights.

    Args:
      name: of the data set.
      seed: of the studies.
      rounds: federated rounds.
      workers: of module `benchmarks.peers`, by peer.
    """
    accuracy, weights, seconds = {}, {}, {}
    for one, algorithm in OURS.items():
        config = settings_of(name, seed, rounds, algorithm)
        accuracy[one], weights[one] = run_ours(config)
        study = studies.build(config)
        seconds[one] = time_rounds(study)
    # Of any of them: they are all the same.
    arrays = for_peers(study)
    for pair in PAIRS:
        row = {"name": pair.name, "peer": pair.peer, "seed": seed, "rounds": rounds}
        row |= {"ours": accuracy[pair.name], "seconds": seconds[pair.name]}
        mine = weights[pair.name]
        if pair.as_peer:
            config = settings_of(name, seed, rounds, pair.as_peer)
            row["as_peer"], mine = run_ours(config)
        theirs = workers[pair.peer].call(
            "run", arrays, peer=pair.peer, algorithm=pair.name, **terms(config)
        )
        row["theirs"] = float(theirs.pop("accuracy"))
        row["their_seconds"] = theirs.pop("seconds")[1:].tolist()
        theirs = {n.removeprefix(round.WEIGHTS): v for n, v in theirs.items()}
        row["distance"] = round.distance(mine, theirs)
        yield row | timing.occasion()


def terms(config: Settings) -> dict[str, float]:
    """The fields of `peers.Terms`, as the settings and `OURS` have them."""
    local, adam, moon = config.local, OURS["fedadam"], OURS["moon"]
    return {
        "width": WIDTH,
        "learning_rate": local.learning_rate,
        "weight_decay": local.weight_decay,
        "batch_size": local.batch_size,
        "server_learning_rate": adam.server_learning_rate,
        "tau": adam.tau,
        "beta_1": adam.beta_1,
        "beta_2": adam.beta_2,
        "mu": moon.mu,
        "temperature": moon.temperature,
        "checked": CHECKED,
    }


def table(rows: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each pair, over seeds, and what differs below it.

    Args:
      rows: of `measure`, of all seeds.
      timed: likewise, also of other numbers of rounds; some may have no seconds.
    """
    lines, notes = [], []
    for pair in PAIRS:
        key = pair.name, pair.peer
        here = [row for row in rows if of(row) == key]
        here.sort(key=lambda row: row["seed"])
        if not here:
            continue
        ours, theirs = ([row[key] for row in here] for key in ("ours", "theirs"))
        mark = ""
        if pair.told:
            notes.append(pair.told)
            mark = f" ({len(notes)})"
        gaps = [row["distance"] for row in here]
        as_peer = [row.get("as_peer", row["ours"]) for row in here]
        lines.append(
            (
                NAMES[pair.name],
                pair.peer + mark,
                ", ".join(str(row["seed"]) for row in here),
                told(ours),
                told(as_peer) if pair.as_peer else "the same",
                told(theirs),
                agree(as_peer, theirs),
                " to ".join(f"{gap:.0e}" for gap in (min(gaps), max(gaps))),
                median([row for row in timed if of(row) == key], "seconds"),
                median([row for row in timed if of(row) == key], "their_seconds"),
            )
        )
    header = [
        "algorithm",
        "peer",
        "seeds",
        "ours",
        "ours, as the peer defines it",
        "peer",
        "within the spread",
        f"weights after {CHECKED} rounds differ by",
        "s per round",
        "peer's s",
    ]
    below = [f"({i}) {note}" for i, note in enumerate(notes, 1)]
    return "\n\n".join([timing.table(header, lines), *below])


def told(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"


def agree(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether means differ by no more than the larger deviation; "-" for one seed."""
    if len(ours) == 1:
        return "-"
    gap = abs(statistics.mean(ours) - statistics.mean(theirs))
    return "yes" if gap <= max(map(statistics.stdev, (ours, theirs))) else "no"


def of(row: dict[str, Any]) -> tuple[str, str]:
    """The algorithm and the peer of a row of `measure`."""
    return row["name"], row["peer"]


def median(rows: Sequence[dict[str, Any]], key: str) -> str:
    """Median of the seconds of all rounds of all rows; "-" if there are none."""
    values = [value for row in rows for value in row.get(key, ())]
    return f"{statistics.median(values):.3f}" if values else "-"


def check(rows: Sequence[dict[str, Any]]) -> None:
    """That ours and the peer's are one algorithm where the definitions are the same.

    Args:
      rows: of `measure`.

    Raises:
      AssertionError: weights are others.
    """
    for row in rows:
        if not row["distance"] < MAX_DISTANCE:
            raise AssertionError(
                f"{row['name']} of {row['peer']}, seed {row['seed']}: weights differ"
                f" by {row['distance']:.1e}"
            )


def main() -> None:
    """Measure, keep, print, check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--name", default="digits", choices=("digits", "fashion_mnist"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    launch.prepare()
    path = timing.RESULTS / f"agreement_{args.name}.json"
    with contextlib.ExitStack() as stack:
        workers = {
            peer: stack.enter_context(worker.Worker(peer, "benchmarks.peers"))
            for peer in sorted({pair.peer for pair in PAIRS})
        }
        for seed in map(int, args.seeds.split(",")):
            for row in measure(args.name, seed, args.rounds, workers):
                timing.keep(path, row, "name", "peer", "seed", "rounds")
                print(json.dumps(row), flush=True)
    kept = timing.kept(path)
    rows = [row for row in kept if row["rounds"] == args.rounds]
    print(table(rows, kept))
    check(rows)


if __name__ == "__main__":
    main()
