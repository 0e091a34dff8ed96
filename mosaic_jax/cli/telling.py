"""What a study says of itself: before it runs, and when it is done."""

import logging
import pathlib
import shlex
import time
from collections.abc import Mapping, Sequence

import numpy as np

from mosaic_jax.core import files
from mosaic_jax.report import glossary
from mosaic_jax.run import environment, programs
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.summary import OverSeeds, Summary
from mosaic_jax.stages import private

_log = logging.getLogger(__name__)
# Studies on CPUs compute at this share of what a large product of matrices reaches:
# between 0.2 and 0.6 in benchmarks/results, small networks lowest.
_SHARE = (0.2, 0.6)
# Up to this many seconds are told as seconds.
_SECONDS = 100


def opening(works: Sequence[Experiment], workdir: pathlib.Path) -> None:
    """Log what is about to run: data, clients, network, stages, time and folder.

    Args:
      works: the study, of each seed.
      workdir: that everything goes to.
    """
    if environment.is_primary():
        for line in opening_lines(works, workdir):
            _log.info("%s", line)


def opening_lines(works: Sequence[Experiment], workdir: pathlib.Path) -> list[str]:
    """The lines of `opening`."""
    first = works[0]
    study, data, settings = first.study, first.data, first.settings
    info, count = data.info, data.label_count
    images = {"training": int(count.sum())} | {
        name: len(held_out.label) for name, held_out in reversed(data.held_out.items())
    }
    mode, seed = settings.data.split, settings.seed
    at = f" at alpha {settings.data.alpha:g}" if "dirichlet" in mode else ""
    seeds = f"seeds {seed} to {seed + len(works) - 1}" if works[1:] else f"seed {seed}"
    names = [link.name for link in study.chain]
    todo = [name for work in works for name in _missing(work)]
    flops = sum(study.flops[name] for name in todo)
    quoted = shlex.quote(str(workdir))
    return [
        f"{settings.data.name}: {info.num_classes} classes of"
        f" {' x '.join(map(str, info.image_shape))};"
        f" {', '.join(f'{n} {name}' for name, n in images.items())} images",
        f"{len(count)} clients, split {mode}{at}: {_range(count.sum(1))} images,"
        f" {_range((count > 0).sum(1))} classes each; {seeds}",
        f"{' and '.join(settings.networks)}, {study.num_parameters:,} parameters,"
        f" {settings.model.dtype}, on {environment.device()}",
        f"{glossary.method(settings)}: {', '.join(names)}; {settings.total_rounds}"
        " federated rounds",
        *([private.line(study.privacy)] if study.privacy else []),
        _time(flops) if todo else "every stage is finished already",
        f"everything goes to {workdir}; mosaic watch {quoted} shows it meanwhile",
    ]


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _missing(work: Experiment) -> list[str]:
    """Names of the stages that are finished nowhere yet."""
    roots = [work.workdir, *work.reuse_from]
    return [
        planned[0].name
        for planned in work.plan()
        if not any(work.find(root, planned) for root in roots)
    ]


def _time(flops: float) -> str:
    """How long so many FLOPs take, as far as that can be known before the first."""
    work = f"{flops / 1e12:.3g} TFLOP to compute"
    if "(cpu)" not in environment.device():
        return f"{work}; the time left is in every line once steps run"
    low, high = (flops / (share * _peak()) for share in reversed(_SHARE))
    return f"{work}: {_about(low, high)} here, and up to two minutes to compile"


def _about(low: float, high: float) -> str:
    if high < _SECONDS:
        return f"about {max(low, 1):.0f} to {max(high, 2):.0f} s"
    return f"about {max(low / 60, 1):.0f} to {high / 60:.0f} min"


def _peak() -> float:
    """FLOP/s of a product of matrices on this machine's cores, timed: 0.1 s."""
    matrix = np.ones((1024, 1024), np.float32)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        np.matmul(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


def ending(
    found: Summary | OverSeeds,
    pages: Sequence[pathlib.Path],
    study: Settings,
    workdir: pathlib.Path,
    command: Sequence[str],
    place: str,
) -> None:
    """Print accuracies, where the files are, and what to do next.

    Args:
      found: the summary.
      pages: the reports.
      study: its settings.
      workdir: its run directory.
      command: that it was started by.
      place: the workdir as it was given: a folder, or the URL that has a copy.
    """
    print_summary(found, study)
    print(f"summary  {workdir / 'summary.json'}")
    for page in pages:
        print(f"report   {page}")
    if files.is_url(place):
        print(f"copy     {place}")
    for line in following(study, place, command):
        print(f"next     {line}")


def following(study: Settings, place: str, command: Sequence[str]) -> list[str]:
    """What to type after a study, where the command that started it is known.

    Args:
      study: its settings.
      place: of its run directory: a folder, which a report can be drawn of, or a URL.
      command: that it was started by, the program's name first.
    """
    if len(command) < 2:
        return []
    others = programs.without(command[1:], ("workdir", "reuse_from"))
    start = f"{programs.spelled(command[0])} {shlex.join(others)}"
    here, other = (shlex.quote(f"{place}{suffix}") for suffix in ("", "-other"))
    lines = [f"{start} --workdir {other} --reuse_from {here}"]
    if study.method == "mosaic":
        lines[0] += f" --config.distill.steps={2 * study.distill.steps}"
    else:
        lines[0] += f" --config.seed={study.seed + 1}"
    if files.is_url(place):
        return lines
    console = programs.spelled(command[0]).replace("launch.py", "-m mosaic_jax")
    console = console.removesuffix(" run")
    lines.append(f"{console} report {here} {other} -o compare.html")
    return lines


def print_summary(found: Summary | OverSeeds, study: Settings) -> None:
    """Table of accuracies on stdout, over several seeds with their spread."""
    width = 12 if isinstance(found, Summary) else 18
    sets = found.accuracies
    names = {name: glossary.model(name, study) for name in found.test_accuracy}
    first = max(16, *(len(name) + 2 for name in names.values()))
    print(f"{'accuracy':<{first}}" + "".join(f"{name:>{width}}" for name in sets))
    for model, name in names.items():
        shown = [_shown(accuracy.get(model)) for accuracy in sets.values()]
        print(f"{name:<{first}}" + "".join(f"{value:>{width}}" for value in shown))


def _shown(value: float | Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return f"{value['mean']:.4f} ± {value['spread']:.4f}"
    return f"{value:.4f}"
