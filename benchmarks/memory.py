"""Device memory that each stage of a config needs, by its compiled programs.

    python -m benchmarks.memory
    python -m benchmarks.memory --configs tiny_imagenet_mosaic --stages prototypes,meta

Every program of every stage is compiled for the shapes of the full study and XLA asked
what it needs for arguments, results and what lies between; nothing is run, no data set
is read: images are black, labels balanced and split as the config says. Clients run one
at a time, as they do where memory is short; on accelerators `compute.clients_at_once`
takes what is left. XLA's answer is that of this machine's
backend. What other stages have left on the device is added: artifacts that the stage
does not read. Prints, and writes to benchmarks/results/memory.json, GB of each stage's
largest program, and with what is left.
"""

import argparse
import hashlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import study, timing
from mosaic_jax.cli import launch
from mosaic_jax.core import trees
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Prototypes, Tree
from mosaic_jax.data.arrays import Arrays, Info
from mosaic_jax.data.federated import Data
from mosaic_jax.run.placement import Placement
from mosaic_jax.run.study import Study

CONFIGS = (
    "cifar10_mosaic",
    "cifar100_mosaic",
    "tiny_imagenet_mosaic",
    "food101_mosaic",
    "svhn_mosaic",
    "mnist_mosaic",
    "fashion_mnist_mosaic",
)
NUM_TRAIN = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny_imagenet": 100_000,
    "food101": 75_750,
    "svhn": 73_257,
    "mnist": 60_000,
    "fashion_mnist": 60_000,
}
NUM_TEST = 10_000
_compile = jax.jit


class Programs:
    """Stands in for `jax.jit`: compiles for the shapes of the arguments, runs nothing.

    Results are zeros in host memory, which take none of it until they are written to.
    """

    def __init__(self) -> None:
        self.needed: list[int] = []
        self._known: dict[str, int] = {}

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """What `jax.jit` gives, but for the running."""
        jitted, known = _compile(function, **options), {}

        def call(*args: Any, **named: Any) -> Tree:
            args, named = _shapes((args, named))
            leaves, structure = jax.tree.flatten((args, named))
            shapes = (*leaves, structure)
            if shapes not in known:
                known[shapes] = jitted.lower(*args, **named)
                self._note(known[shapes])
            return jax.tree.map(_filled, known[shapes].out_info)

        call.lower = jitted.lower
        return call

    def _note(self, lowered: Any) -> None:
        """Take down what a program needs; init and warmup share one, for example."""
        name = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if name not in self._known:
            found = lowered.compile().memory_analysis()
            self._known[name] = (
                found.argument_size_in_bytes
                + found.output_size_in_bytes
                + found.temp_size_in_bytes
                - found.alias_size_in_bytes
            )
        self.needed.append(self._known[name])


def _shapes(tree: Tree) -> Tree:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | np.ndarray):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.map(one, tree)


def _filled(shape: Any) -> np.ndarray:
    return np.zeros(shape.shape, shape.dtype)


def arrays(config: Data, info: Info) -> Arrays:
    """Images that are all black, every class as often."""

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = (np.arange(count) % info.num_classes).astype(np.int32)
        return np.zeros((count, *info.image_shape), np.uint8), label

    return Arrays(*images(NUM_TRAIN[config.name]), *images(NUM_TEST))


def study_of(name: str, network: str) -> Study:
    """The study of config `name`, with `network` in place of its own where given."""
    overrides = {
        "compute.clients_at_once": 1,
        "compute.devices": 1,
        "compute.client_state": "device",
        "generators.collapse_below": 0.0,
    }
    if network:
        overrides["model.name"] = network
    return study.of_config(name, overrides, arrays)


def prototypes_of(work: Study) -> Prototypes:
    """The most there can be: all clusters of a class that a client has enough of."""
    clusters = work.settings.prototypes.clusters
    count = work.data.label_count
    held = np.where(count >= clusters, clusters, np.minimum(count, 1)).sum()
    num_classes = work.data.info.num_classes
    num_experts = num_classes * len(work.networks)
    return Prototypes(
        logits=np.zeros((held, num_experts, num_classes), np.float32),
        gate_logits=np.zeros((held, num_classes), np.float32),
        label=np.zeros(held, np.int32),
        client=np.zeros(held, np.int32),
    )


def compile_stage(run: Run, programs: Programs) -> dict[str, Tree]:
    """Take down the stage's programs; returns its artifacts, of zeros."""
    state = None
    while True:
        try:
            steps = run.send(state)
        except StopIteration as end:
            return end.value.artifacts
        programs.jit(steps.chunk, donate_argnums=1)(
            steps.args, steps.state, jnp.asarray(0), jnp.asarray(1)
        )
        state = jax.tree.map(_filled, _shapes(steps.state))


def measure(name: str, wanted: tuple[str, ...], network: str) -> list[dict[str, Any]]:
    """A row for each stage, or for those that are `wanted`.

    Args:
      name: of the config, and its variant after a colon.
      wanted: names of stages; (): all.
      network: in place of the config's; "": none.
    """
    work, programs = study_of(name, network), Programs()
    placement = Placement(work)
    artifacts: dict[str, Tree] = {}
    rows = []
    for link in work.chain:
        left, programs.needed = dict(artifacts), []
        needed = {key: left.pop(key) for key in link.needs(work.settings)}
        left.pop("prototypes", None)
        start = time.perf_counter()
        is_wanted = not wanted or link.name in wanted
        note = programs._note if is_wanted else lambda lowered: None
        context = placement.context(link)
        with (
            mock.patch.object(programs, "_note", note),
            mock.patch.object(jax, "jit", programs.jit),
        ):
            artifacts |= compile_stage(link.run(context, needed), programs)
        if "prototypes" in artifacts:
            artifacts["prototypes"] = prototypes_of(work)
        if not is_wanted:
            continue
        largest = max(programs.needed, default=0)
        with_left = largest + sum(map(trees.num_bytes, left.values()))
        rows.append(
            {
                "config": name,
                "stage": link.name,
                "program_gb": largest / 1e9,
                "with_left_gb": with_left / 1e9,
                "seconds": time.perf_counter() - start,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--stages", default="", help="by comma; all if empty")
    parser.add_argument("--network", default="", help="instead of the config's")
    args = parser.parse_args()
    launch.prepare()
    wanted = tuple(filter(None, args.stages.split(",")))
    rows = [
        row
        for name in args.configs.split(",")
        for row in measure(name, wanted, args.network)
    ]
    shown = [
        (r["config"], r["stage"], f"{r['program_gb']:.2f}", f"{r['with_left_gb']:.2f}")
        for r in rows
    ]
    header = "config", "stage", "largest program, GB", "with what is left, GB"
    print(timing.table(header, shown))
    timing.save("memory", {"rows": rows})


if __name__ == "__main__":
    main()
