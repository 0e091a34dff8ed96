"""What launch.py does once its flags are parsed."""

import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mosaic_jax import environment, errors, experiment, report, settings, tracking
from mosaic_jax.loop import Interrupted

_log = logging.getLogger(__name__)


def run(
    config: dict[str, Any],
    workdir: pathlib.Path,
    *,
    reuse_from: Sequence[str] = (),
    command: Sequence[str] = (),
    processes: tuple[str, int, int] = ("", 1, 0),
) -> int:
    """Run a study; returns the exit code: 0, 2 for a user's error, 128 + signal.

    `processes` are the arguments of `environment.join`.
    """
    prepare()
    try:
        environment.join(*processes)
        study = settings.from_mapping(config)
        if study.seeds == 1:
            summary = _run_one(study, workdir, reuse_from, command)
        else:
            summary = _run_seeds(study, workdir, reuse_from, command)
    except errors.MosaicError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    if environment.is_primary():
        print_summary(summary)
        print(f"summary  {workdir / 'summary.json'}")
        pages = sorted(workdir.glob("report.html")) or workdir.glob("seed_*/*.html")
        for page in pages:
            print(f"report   {page}")
    return 0


def _run_one(
    study: settings.Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str],
    command: Sequence[str],
) -> dict[str, Any]:
    """Run and report the study of one seed; returns its summary."""
    work = experiment.Experiment(study, workdir, reuse_from=reuse_from, command=command)
    summary = work.run()
    if environment.is_primary():
        report.write(work)
    return summary


def _run_seeds(
    study: settings.Settings,
    workdir: pathlib.Path,
    reuse_from: Sequence[str],
    command: Sequence[str],
) -> dict[str, Any]:
    """One seed after the other in WORKDIR/seed_N; returns what they have in common."""
    summaries = []
    for seed in range(study.seed, study.seed + study.seeds):
        name = f"seed_{seed}"
        one = dataclasses.replace(study, seed=seed, seeds=1)
        # Of a run of several seeds, the same seed's stages.
        earlier = [
            path if (pathlib.Path(path) / "stages").is_dir() else f"{path}/{name}"
            for path in reuse_from
        ]
        _log.info("seed %d", seed)
        summaries.append(_run_one(one, workdir / name, earlier, command))
    summary = experiment.over_seeds(summaries)
    if environment.is_primary():
        tracking.write_json(workdir / "summary.json", summary)
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """Table of accuracies on stdout, over several seeds with their spread."""
    sets = [name for name in ("test", "validation") if f"{name}_accuracy" in summary]
    width = 12 if "seed" in summary else 18
    print(f"{'accuracy':<16}" + "".join(f"{name:>{width}}" for name in sets))
    for model in summary["test_accuracy"]:
        shown = [_shown(summary[f"{name}_accuracy"][model]) for name in sets]
        print(f"{model:<16}" + "".join(f"{value:>{width}}" for value in shown))


def _shown(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.4f} ± {value['spread']:.4f}"
    return f"{value:.4f}"


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        path = pathlib.Path(cache) / "mosaic_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(path))
    # The small ones too: by default programs that compile within a second are left out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
