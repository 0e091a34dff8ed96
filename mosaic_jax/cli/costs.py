"""What a study would cost: told by `--dry_run`, which runs nothing of it."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

from mosaic_jax.cli import compared, experiments
from mosaic_jax.core import errors
from mosaic_jax.core import programs as traced
from mosaic_jax.run import devices, estimate, fairness, forecast, rehearsal
from mosaic_jax.run.devices import Device
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings


@contextlib.contextmanager
def target_of(target: str, dry_run: str) -> Iterator[Device | None]:
    """The device that programs are traced for in this context; None: those here.

    Raises:
      ConfigError: it is not known, or the study would be run.
    """
    if not target:
        yield None
        return
    if dry_run != "count":
        raise errors.ConfigError(f"--target = {target}: must come with --dry_run")
    device = devices.find(target)
    with traced.traced_for(devices.target(device)):
        yield device


def tell_forecast(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    device: Device | None,
) -> None:
    """Print what a study, each method of a comparison, would cost, by its shapes.

    Args:
      study: settings.
      workdir: run directory; nothing is written there.
      reuse_from: run directories whose finished stages may be used.
      device: that programs are traced for; None: those that are here.
    """
    if traced.target() is not None:
        # It is told for one device: those of this machine say nothing of the target's.
        compute = dataclasses.replace(study.compute, devices=1)
        study = dataclasses.replace(study, compute=compute)
        # What is finished here is no part of a study that runs elsewhere.
        workdir = workdir / "elsewhere"

    def tell(work: Experiment) -> None:
        print(forecast.table(forecast.forecast(work.study, device), work.study, device))

    made_up = functools.cache(rehearsal.made_up)
    if made_up(study.data, study.seed) is not None:
        print(
            f"{study.data.name} is not prepared in {study.data.dir}: labels are made"
            " up, balanced and split as configured"
        )
    _tell_each(study, workdir, reuse_from, tell, made_up)


def tell_measured(
    study: Settings, workdir: pathlib.Path, reuse_from: Sequence[pathlib.Path]
) -> None:
    """Print what a study, each method of a comparison, would cost, by trying it.

    Args:
      study: settings.
      workdir: run directory; nothing is written there.
      reuse_from: run directories whose finished stages may be used.
    """

    def tell(work: Experiment) -> None:
        costs = estimate.estimate(work)
        print(estimate.table(costs, work.study.num_parameters))

    _tell_each(study, workdir, reuse_from, tell)


def _tell_each(
    study: Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[pathlib.Path],
    tell: Callable[[Experiment], None],
    data: experiments.DataOf = experiments.as_named,
) -> None:
    """Tell the cost of a study, or of each method of a comparison.

    All are made and checked before the first is told, which may take minutes.

    Args:
      study: settings.
      workdir: run directory; nothing is written there.
      reuse_from: run directories whose finished stages may be used.
      tell: prints the cost of a study.
      data: see `experiments.make`.
    """
    if study.compare:
        works = compared.by_method(study, workdir, reuse_from, data=data)
        fairness.check_fair(works)
    else:
        works = {"": experiments.make(study, workdir, reuse_from, data=data)}
    done = {name: group[0].finished() for name, group in works.items()}
    for name, group in works.items():
        if name:
            print(f"\n{name}")
        tell(group[0])
        if done[name]:
            print(f"finished already: {', '.join(one.name for one in done[name])}")
        if len(group) > 1:
            print(f"for each of {len(group)} seeds")
