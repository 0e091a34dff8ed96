"""Where the time of a client's local step goes, from a profile.

    python -m benchmarks.breakdown
    python -m benchmarks.breakdown --norm group --width 64

Profiles a program that runs two local steps of ResNet-18, 64 images of 32 x 32, for two
clients, on the CPU; prints milliseconds per client-step by kind of work, and writes
benchmarks/results/breakdown_NORM_WIDTH.json. The sum exceeds the time of a step where
operations overlap.
"""

import argparse
import collections
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_data, timing
from benchmarks.random_data import CLASSES, DEPTH, SIDE
from mosaic_jax.cli import launch
from mosaic_jax.core import prng, trees
from mosaic_jax.fl import client_program, parallel, training
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import Hooks, LocalSGD
from mosaic_jax.nn import resnet
from mosaic_jax.nn.classifier import Classifier

CLIENTS, STEPS, BATCH = 2, 2, 64


def program(width: int, norm: str):
    """The compiled program and its arguments."""
    classifier = Classifier(
        resnet.ResNet(CLASSES, width=width, norm=norm),
        (0.5,) * DEPTH,
        (0.25,) * DEPTH,
    )
    data = random_data.dataset(CLIENTS, STEPS * BATCH)
    axis = parallel.build(data.client.size, num_devices=1)
    placed = axis.place(data)
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(prng.root(0), (SIDE, SIDE, DEPTH))
    local = training.Local(STEPS, BATCH, learning_rate=0.01, weight_decay=1e-4)
    sgd = LocalSGD(classifier, Hooks(), local)

    def one(model, client, images):
        batch_at = training.client_batches(
            client,
            images,
            0,
            STEPS,
            key=prng.root(1),
            batch_size=BATCH,
            augmentation="none",
        )
        turn = Turn(
            model, {}, client, {}, jnp.zeros((), jnp.int32), prng.root(1), local
        )
        result, loss = client_program.run(sgd, turn, batch_at, STEPS)
        return result.model, loss

    def run(model, data):
        models = trees.broadcast(model, CLIENTS)
        return axis.map(one, models, data.client, placed=(data.images,))

    return jax.jit(run).lower(model, placed).compile(), (model, placed)


def kind(instruction: str, path: str) -> str:
    """What an instruction of the program belongs to, by its name and origin."""
    if not re.search(r"conv\d?/|shortcut_conv", path):
        return "norm" if re.search(r"bn\d?/|shortcut_bn", path) else "other"
    backward = "transpose(" in path
    multiplies = path.endswith(("conv_general_dilated", "dot_general"))
    if not multiplies:
        return "copies for the kernel gradient" if backward else "copies, forward"
    if not backward:
        return "forward convolutions"
    if path.endswith("dot_general"):
        return "products of the kernel gradient"
    return "input gradients"


def profile(compiled, arguments) -> dict[str, float]:
    """Milliseconds per client-step by kind."""
    origin = dict(
        re.findall(r"%([\w.\-]+) = [^\n]*op_name=\"([^\"]*)\"", compiled.as_text())
    )
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(*arguments))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        recorded = jax.profiler.ProfileData.from_file(str(path))
    total: collections.Counter[str] = collections.Counter()
    for plane in recorded.planes:
        for line in plane.lines:
            for event in line.events:
                # A loop contains what it runs.
                if event.name in origin and not event.name.startswith("while"):
                    name = kind(event.name, origin[event.name])
                    total[name] += event.duration_ns / 1e6 / CLIENTS / STEPS
    return dict(total.most_common())


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    launch.prepare()
    compiled, arguments = program(args.width, args.norm)

    def run() -> None:
        jax.block_until_ready(compiled(*arguments))

    seconds = timing.take_turns({"step": run}, 5)["step"]
    start = time.process_time()
    run()
    cores = (time.process_time() - start) / float(np.median(seconds))
    step = 1e3 * float(np.median(seconds)) / CLIENTS / STEPS
    found = profile(compiled, arguments)
    rows = [(name, f"{ms:.1f}") for name, ms in found.items()]
    rows += [("a step, all in all", f"{step:.1f}"), ("cores busy", f"{cores:.1f}")]
    print(timing.table(["", "ms per client-step"], rows))
    result = {"kinds": found, "step": step, "cores": cores}
    timing.save(f"breakdown_{args.norm}_{args.width}", result)


if __name__ == "__main__":
    main()
