"""What a study takes on an accelerator that is not here, from its compiled programs.

    make ahead    # an environment with JAX's compilers for NVIDIA GPUs and TPUs
    .ahead/bin/python -m benchmarks.ahead --target h100
    .ahead/bin/python -m benchmarks.ahead --target v5e --config svhn_mosaic --devices 8

Every program of every stage is compiled for the target at full size; nothing is run, no
data set is read: images are black, labels balanced and split as the config says.
Prints, and writes to benchmarks/results/ahead_CONFIG_TARGET.json, for each loop:
seconds to compile; kernels, GB and GFLOP of one training step of all clients that run
at once (see `benchmarks.ahead_text`); GB of memory that the program needs; the
roofline time of a step; steps in the study, and their seconds with all that is around
them. Other programs have a row each, all of the program being the step. The roofline
is the larger of bytes over bandwidth and FLOPs over 75 % of the matrix peak, plus 2 us
a kernel. All of it is computed, not measured.
"""

import argparse
import ast
import dataclasses
import hashlib
import pathlib
import re
import time
from typing import Any

from benchmarks import ahead_targets, ahead_text, timing
from mosaic_jax.cli import config_files
from mosaic_jax.core import programs
from mosaic_jax.core.costs import Counts, Loop
from mosaic_jax.run import devices, rehearsal, settings
from mosaic_jax.run import study as studies
from mosaic_jax.run.devices import Device
from mosaic_jax.run.rehearsal import Part, Seen
from mosaic_jax.run.study import Study

HEADER = (
    "loop", "compile, s", "kernels", "GB", "GFLOP", "memory, GB", "ms", "steps", "s",
)  # fmt: skip


class Compiler:
    """Examines programs by compiling them for a target."""

    def __init__(self, shapes: ahead_targets.Shapes, wanted: tuple[str, ...]) -> None:
        """Nothing is compiled yet; of stages or programs, all or those `wanted` are."""
        self._shapes, self._wanted = shapes, wanted
        self._known: dict[str, Seen] = {}
        self.texts: dict[str, str] = {}

    def __call__(
        self, program: Any, args: tuple, named: dict[str, Any], name: str
    ) -> Seen:
        """What the compiled program tells; equal ones are compiled once.

        Args:
          program: a jitted function.
          args: its arguments.
          named: further ones.
          name: of stage and program.
        """
        args, named = self._shapes((args, named))
        traced = program.trace(*args, **named)
        if self._wanted and not {name, name.split()[0]} & {*self._wanted}:
            return Seen(Loop(Counts()), 0, traced.out_info)
        lowered = traced.lower()
        text = re.sub(r"^module @\w+", "", lowered.as_text(), flags=re.MULTILINE)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in self._known:
            return dataclasses.replace(self._known[key], seconds=0.0)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        print(f"{name}: compiled in {seconds:.1f} s", flush=True)
        self.texts[name] = compiled.as_text()
        memory = compiled.memory_analysis()
        needs = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        loop = ahead_text.read(self.texts[name])
        self._known[key] = Seen(loop, needs, traced.out_info, seconds)
        return self._known[key]


def study_of(name: str, overrides: dict[str, Any]) -> Study:
    """The study of a config on images that are made up.

    Args:
      name: of the config, and its variant after a colon.
      overrides: values of fields of the config by dotted name.
    """
    mapping = config_files.load(name)
    # Generators of zeros would all count as collapsed.
    mapping.update_from_flattened_dict({"generators.collapse_below": 0.0, **overrides})
    config = settings.from_mapping(mapping.to_dict())
    return studies.build(config, rehearsal.made_up(config.data, config.seed))


def row(stage: str, part: Part, device: Device) -> dict[str, Any]:
    """A program as results hold it.

    Args:
      stage: its name.
      part: the program.
      device: that it was compiled for.
    """
    step = part.training.iteration()
    return {
        "loop": f"{stage} {part.name}",
        "kernels_per_step": step.kernels,
        "bytes_per_step": step.bytes,
        "flops_per_step": step.flops,
        "estimated_cycles_per_step": step.cycles,
        "memory_bytes": part.seen.memory,
        "compile_seconds": part.seen.seconds,
        "seconds_per_step": device.roofline(part.training.once()),
        "steps": part.steps,
        "seconds": part.seconds(device),
    }


def shown(found: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the printed table."""
    return (
        found["loop"],
        f"{found['compile_seconds']:.1f}",
        f"{found['kernels_per_step']:.0f}",
        f"{found['bytes_per_step'] / 1e9:.3f}",
        f"{found['flops_per_step'] / 1e9:.1f}",
        f"{found['memory_bytes'] / 1e9:.2f}",
        f"{1e3 * found['seconds_per_step']:.3f}",
        found["steps"],
        f"{found['seconds']:.1f}",
    )


def main() -> None:
    """Compile, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", required=True, choices=list(devices.DEVICES))
    parser.add_argument("--config", default="cifar10_mosaic", help="name[:variant]")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--stages", default="", help="by comma; all if empty")
    parser.add_argument("--dtype", default="bfloat16", help="of activations")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE")
    parser.add_argument("--dump", default="", help="folder for the compiled texts")
    args = parser.parse_args()
    ahead_targets.prepare(args.devices)
    device = devices.find(args.target)
    wanted = tuple(filter(None, args.stages.split(",")))
    found = ahead_targets.topology(args.target, args.devices).devices
    shapes = ahead_targets.Shapes(found[: args.devices])
    compiler = Compiler(shapes, wanted)
    overrides = {
        "model.dtype": args.dtype,
        "compute.devices": args.devices,
        **dict(map(_override, args.set)),
    }
    rows, memory = [], 0
    with programs.traced_for(programs.Target(device.platform, device.free, shapes)):
        work = study_of(args.config, overrides)
        for found in rehearsal.rehearse(work, compiler, wanted):
            name = found.link.name
            if wanted and name not in wanted:
                continue
            rows += [row(name, part, device) for part in found.parts]
            memory = max(memory, found.memory)
    if args.dump:
        folder = pathlib.Path(args.dump)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in compiler.texts.items():
            (folder / f"{name.replace(' ', '_')}.txt").write_text(text)
    print(timing.table(HEADER, list(map(shown, rows))))
    total = sum(one["seconds"] for one in rows)
    print(
        f"{args.config} on {args.devices} x {device.title}: {total / 60:.2f} minutes,"
        f" {memory / 1e9:.2f} GB of {device.free / 1e9:.1f}"
    )
    if not wanted and not args.set:
        several = f"_{args.devices}" if args.devices > 1 else ""
        name = f"ahead_{args.config.replace(':', '_')}_{args.target}{several}"
        found = {"loops": rows, "total_seconds": total, "memory_bytes": memory}
        timing.save(name, found)


def _override(text: str) -> tuple[str, Any]:
    """A field and its value."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
