"""What launch.py does once its flags are parsed."""

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
        study = experiment.Experiment(
            settings.from_mapping(config),
            workdir,
            reuse_from=reuse_from,
            command=command,
        )
        summary = study.run()
        page = report.write(study) if environment.is_primary() else None
    except errors.MosaicError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    if page is None:
        return 0
    print_summary(summary)
    print(f"summary  {workdir / 'summary.json'}\nreport   {page}")
    return 0


def print_summary(summary: dict[str, Any]) -> None:
    """Table of accuracies on stdout."""
    sets = [name for name in ("test", "validation") if f"{name}_accuracy" in summary]
    print(f"{'accuracy':<16}" + "".join(f"{name:>12}" for name in sets))
    for model in summary["test_accuracy"]:
        values = (summary[f"{name}_accuracy"][model] for name in sets)
        print(f"{model:<16}" + "".join(f"{value:>12.4f}" for value in values))


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        path = pathlib.Path(cache) / "mosaic_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
