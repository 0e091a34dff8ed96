"""What lies where, and what devices tell each other: 1 to 256 devices, many clients.

    python -m benchmarks.scale

Nothing is run. What lies on a device, in host memory and on disk are the bytes of the
arrays that a study has, by their shapes, for 10 and 20 clients; all are linear in the
clients. What devices tell each other is read from programs of 64 clients, of full size
and as they are traced for H100s, that are compiled for 8 and 64 CPU devices: XLA
divides a program before it turns to the platform. Prints the tables of docs/scale.md,
and writes benchmarks/results/scale.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import ahead, ahead_targets, timing
from mosaic_jax.cli import config_files
from mosaic_jax.core import programs, trees
from mosaic_jax.core.costs import Loop
from mosaic_jax.core.types import Tree
from mosaic_jax.data import federated, sources
from mosaic_jax.data.dataset import Arrays
from mosaic_jax.fl import gan
from mosaic_jax.run import devices, memory, rehearsal, settings
from mosaic_jax.run import study as studies
from mosaic_jax.run.study import Study
from mosaic_jax.stages import federation

CONFIG, IMAGES, HELD_OUT = "cifar10_mosaic", 50, 2560
DEVICE = devices.DEVICES["h100"]
DEVICES, COMPILED = (1, 8, 64, 256), (1, 8, 64)
CLIENTS, COMPILED_CLIENTS = (10, 1_000, 100_000, 1_000_000), 64
SHOWN = 8  # devices, where they matter to what lies on one
_ROUNDS = {"method": "federated", "finetune.rounds": 0}
STUDIES: dict[str, dict[str, Any]] = {
    "FedAvg": _ROUNDS,
    "FedAvg, some a round": _ROUNDS | {"init.clients_per_round": 5},
    "SCAFFOLD": _ROUNDS | {"init.method": "scaffold"},
    "SCAFFOLD, states on the host": _ROUNDS
    | {"init.method": "scaffold", "compute.client_state": "host"},
    "FedAvg, median": _ROUNDS | {"aggregation.rule": "median"},
    "Mosaic": {"distill.pool": 0},
}
# Programs by study: what is told of is a step of the outermost loop over training
# steps, or the whole program where there is none.
PROGRAMS = {
    "FedAvg": {"init round": "a round"},
    "SCAFFOLD": {"init round": "a round"},
    "FedAvg, median": {"init round": "a round"},
    "Mosaic": {
        "init round": "a round, models are kept",
        "generators gan": "a window of GAN steps",
        "experts predict": "evaluation of the experts",
        "meta head": "a step of the meta head",
        "distill student": "a step of the distillation",
        "distill predict": "evaluation of the student",
        "reference reference": "a step of the audit's network",
        "audit compare": "audit of a client",
    },
}
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
)
_ROWS = "rows: "
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclasses.dataclass(frozen=True)
class Term:
    """Arrays that are resident somewhere.

    Attributes:
      name: what they are.
      where: "device" or "host", of each device or process, or "disk".
      fixed: bytes that do not depend on the clients.
      each: bytes for each client.
      divided: whether the devices have a part each; else all have the whole.
      stages: those in which they lie there.
    """

    name: str
    where: str
    fixed: float
    each: float
    divided: bool
    stages: tuple[str, ...]

    def bytes(self, clients: int, num_devices: int) -> float:
        """Bytes in one place."""
        part = -(-clients // num_devices) if self.divided else clients
        return self.fixed + self.each * part


def study_of(name: str, num_clients: int, **fields: Any) -> Study:
    """A study of `STUDIES` on black images, `IMAGES` for each client."""
    mapping = config_files.load(CONFIG)
    mapping.update_from_flattened_dict(
        {
            "generators.collapse_below": 0.0,
            "data.split": "iid",
            "data.num_clients": num_clients,
            "data.validation": 0.0,
            "model.dtype": "bfloat16",
            **STUDIES[name],
            **fields,
        }
    )
    config = settings.from_mapping(mapping.to_dict())
    info = sources.SOURCES.find(config.data.name).info
    assert info is not None

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = (np.arange(count) % info.num_classes).astype(np.int32)
        return np.zeros((count, *info.image_shape), np.uint8), label

    arrays = Arrays(*images(IMAGES * num_clients), *images(HELD_OUT))
    data = federated.build(config.data, config.seed, info, arrays)
    return studies.build(config, data)


def resident(study: Study) -> Iterator[tuple[str, str, bool, tuple[str, ...], float]]:
    """Name, place, whether it is divided, stages, and bytes of what a study has."""
    data, config, links = study.data, study.settings, study.chain
    stages = {link.stage.name: link for link in links}
    both = ("rounds", "generators") if "generators" in stages else ("rounds",)
    on_host = config.compute.client_state == "host"
    dealt = not memory.runs_anywhere(study)
    images = trees.num_bytes(data.clients.images)
    yield "images", "device", dealt, both, images
    yield "images", "host", False, both, images
    rows = trees.num_bytes(data.clients.client)
    yield "rows of the clients", "device", False, both, rows
    yield "rows of the clients", "host", False, both, rows
    held_out = trees.num_bytes(data.held_out) / HELD_OUT * 10_000
    yield "held-out images (10,000)", "device", False, both, held_out
    blueprint = study.blueprint(stages["init"])
    state = federation.state_shapes(blueprint)
    # The weighted uploads of a device's clients are added to their sum.
    sums = 2 * trees.num_bytes(state.model)
    server = trees.num_bytes((state.model, state.server, state.training))
    yield (
        "global model, server's state, sums",
        "device",
        False,
        ("rounds",),
        (server + sums),
    )
    kept: dict[str, Tree] = {
        "states of the clients": (state.client, state.error, state.last_round)
    }
    if "client_models" in blueprint.provides:
        template = stages["init"].template(blueprint)
        kept["models of the clients"] = template["client_models"].model
    for name, tree in kept.items():
        size = trees.num_bytes(tree)
        yield name, "host" if on_host else "device", False, both, size
    # The artifact of the stage, and two checkpoints while it runs.
    whole = trees.num_bytes((kept, state.model, state.server, state.training))
    yield "rounds: state and checkpoints", "disk", False, both, 3 * whole
    yield (
        "uploads of a round",
        "device",
        False,
        ("rounds",),
        (memory.uploads_bytes(study)),
    )
    info, classifier = data.info, study.classifier
    step = memory.classifier_bytes(config, info, classifier)
    yield "a client's step", "device", False, ("rounds",), step
    if "generators" in stages:
        link = stages["generators"]
        seen = study.blueprint(link)
        model_gan = gan.build(seen.settings, info, classifier)
        one = jax.eval_shape(
            lambda: model_gan.init(jax.random.key(0), info.image_shape)
        )
        size = data.clients.num_clients * trees.num_bytes(one)
        yield "GANs and their optimisers", "device", False, ("generators",), size
        step = memory.gan_bytes(config, info, classifier)
        yield "a client's GAN step", "device", False, ("generators",), step
        made = trees.num_bytes(link.template(seen)["client_generators"])
        yield (
            "GANs: generators and checkpoints",
            "disk",
            False,
            ("generators",),
            (2 * size + made),
        )


def terms(name: str) -> list[Term]:
    """What a study of `STUDIES` has, as it grows with its clients."""
    few, more = (list(resident(study_of(name, count))) for count in (10, 20))
    found = []
    for (what, where, divided, stages, low), (*_, high) in zip(few, more, strict=True):
        each = (high - low) / 10
        found.append(Term(what, where, low - 10 * each, each, divided, stages))
    return [term for term in found if term.fixed or term.each]


def needed(found: list[Term], clients: int, num_devices: int, where: str) -> float:
    """Bytes in one place, in the stage that needs most."""
    return max(
        sum(
            term.bytes(clients, num_devices)
            for term in found
            if term.where == where and stage in term.stages
        )
        for stage in ("rounds", "generators")
    )


def most_clients(found: list[Term], num_devices: int) -> tuple[int, str]:
    """The most clients that fit on a device, and the largest term then."""
    low, high = 1, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        fits = needed(found, middle, num_devices, "device") <= DEVICE.free
        low, high = (middle, high) if fits else (low, middle)
    on_device = [term for term in found if term.where == "device"]
    largest = max(on_device, key=lambda term: term.bytes(low, num_devices))
    return low, largest.name


def outermost(loop: Loop) -> Loop:
    """The first loop over training steps within a program, or the program."""
    waiting = [loop]
    while waiting:
        one = waiting.pop(0)
        if one.trains:
            return one
        waiting += one.loops
    return loop


def worker(num_devices: int) -> None:
    """Of a process of its own: what the programs do on each device, as JSON.

    For one device, whose programs tell nobody anything, they are traced alone.
    """
    ahead_targets.prepare(num_devices)
    shapes = ahead_targets.Shapes(jax.devices()[:num_devices])
    target = programs.Target(DEVICE.platform, DEVICE.free, shapes)
    rows = []
    fields = {"compute.devices": num_devices, "compute.clients_at_once": 1}
    for name, wanted in PROGRAMS.items():
        with programs.traced_for(target):
            study = study_of(name, COMPILED_CLIENTS, **fields)
            examine: rehearsal.Examiner = rehearsal.Counting()
            if num_devices > 1:
                examine = ahead.Compiler(shapes, tuple(wanted))
            stages = {program.split()[0] for program in wanted}
            for found in rehearsal.rehearse(study, examine, stages):
                rows += [
                    {"study": name, "program": program, **told(part)}
                    for part in found.parts
                    if (program := f"{found.link.name} {part.name}") in wanted
                ]
    print(_ROWS + json.dumps(rows))


def told(part: rehearsal.Part) -> dict[str, float]:
    """Counts of a program's step, or of all of it."""
    # What devices tell each other of GANs is around their steps.
    loop = part.seen.loop if part.name == "gan" else outermost(part.seen.loop)
    return dataclasses.asdict(loop.iteration())


def compiled() -> dict[str, list[dict[str, Any]]]:
    """Counts of each device by the number of devices, from processes of their own."""
    found = {}
    for num_devices in COMPILED:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scale", "--worker", str(num_devices)],
            env=os.environ | {"XLA_FLAGS": _FLAGS},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = next(x for x in done.stdout.splitlines() if x.startswith(_ROWS))
        found[str(num_devices)] = json.loads(line.removeprefix(_ROWS))
        print(f"{num_devices} devices: done", file=sys.stderr, flush=True)
    return found


def size(count: float) -> str:
    """Bytes as tables have them."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B" if count else "-"


def shown_terms(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table of what lies where; what several studies have is told of the first."""
    rows: dict[tuple[Any, ...], str] = {}
    for study, of_study in found.items():
        for one in of_study:
            term = Term(**one)
            cells = (size(term.bytes(clients, SHOWN)) for clients in CLIENTS)
            name = f"{term.name}{', divided' if term.divided else ''}"
            rows.setdefault((term.where, name, *cells), study)
    header = ("study", "where", "", *(f"{n:,} clients" for n in CLIENTS))
    return timing.table(header, [(study, *row) for row, study in rows.items()])


def shown_fits(fits: dict[str, dict[str, tuple[int, str]]]) -> str:
    """The table of how many clients fit."""
    rows = [
        (study, *(f"{count:,}: {term}" for count, term in of_study.values()))
        for study, of_study in fits.items()
    ]
    header = (f"{n} device{'s' * (n > 1)}" for n in DEVICES)
    return timing.table(("", *header), rows)


def shown_programs(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table of what devices compute and tell each other."""
    first, *others = found
    rows = []
    for i, row in enumerate(found[first]):
        what = PROGRAMS[row["study"]][row["program"]]
        cells: list[Any] = [f"{row['study']}: {what}", f"{row['flops'] / 1e9:.4g}"]
        for num_devices in others:
            one = found[num_devices][i]
            assert one["program"] == row["program"]
            cells += [
                f"{row['flops'] / one['flops']:.3g}" if one["flops"] else "-",
                size(one["summed"]),
                size(one["exchanged"]),
            ]
        rows.append(cells)
    header = ["", "GFLOP on one device"]
    for num_devices in others:
        header += [f"on {num_devices}: less by", "summed", "exchanged"]
    return timing.table(header, rows)


def tables(result: dict[str, Any]) -> Iterator[str]:
    """The tables of docs/scale.md."""
    yield shown_terms(result["terms"])
    yield shown_fits(result["fits"])
    yield shown_programs(result["programs"])


def main() -> None:
    """Compute, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    with programs.traced_for(devices.target(DEVICE)):
        found = {name: terms(name) for name in STUDIES}
    result = {
        "terms": {
            name: [dataclasses.asdict(term) for term in of_study]
            for name, of_study in found.items()
        },
        "fits": {
            name: {str(n): most_clients(of_study, n) for n in DEVICES}
            for name, of_study in found.items()
        },
        "programs": compiled(),
    }
    print("\n\n".join(tables(result)))
    timing.save("scale", result)


if __name__ == "__main__":
    main()
