"""What `mosaic run` does once its flags are parsed."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mosaic_jax.cli import compared, costs, experiments, telling
from mosaic_jax.core import errors, files
from mosaic_jax.fl import parallel
from mosaic_jax.run import (
    devices,
    environment,
    processes,
    programs,
    settings,
    tracking,
)
from mosaic_jax.run import mirror as mirrors
from mosaic_jax.run.settings import Settings

# Seconds that processes may wait for each other, before settings are checked.
_LONGEST = 1e6


def run(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    reuse_from: Sequence[str] = (),
    command: Sequence[str] = (),
    of_processes: tuple[str, int, int] = ("", 1, 0),
    dry_run: str = "",
    target: str = "",
) -> int:
    """Run a study, of one or more seeds, or a comparison of several methods.

    Args:
      config: nested settings.
      workdir: run directory, or the URL of one in an object store.
      reuse_from: run directories, or URLs, whose finished stages may be used.
      command: by which the study was started, for the records.
      of_processes: the arguments of `processes.join`.
      dry_run: only tell what the study would cost: "count", from the shapes of its
        programs, or "measure", by running a few steps of each loop; "": run it.
      target: with "count", the device to tell it for, see `run.devices`; "": those
        that are here.

    Returns:
      The exit code: 0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    prepare()
    place = str(workdir)

    def program() -> None:
        processes.join(*of_processes, **_time_limits(config))
        with processes.fail_together(), costs.target_of(target, dry_run) as device:
            make_devices(config)
            study = settings.from_mapping(config)
            # What each does next depends on it.
            url = place if files.is_url(place) else ""
            told = {"--dry_run": dry_run, "--workdir that is a URL": url}
            processes.agree({"command": told})
            reused = [_local("--reuse_from", one) for one in reuse_from]
            if dry_run:
                folder = _local("--workdir", place, needed=False)
                if dry_run == "measure":
                    costs.tell_measured(study, folder, reused)
                else:
                    costs.tell_forecast(study, folder, reused, device or devices.here())
                return
            _check_alone(study, url)
            with mirrors.opened(place) as (folder, mirror):
                if study.compare:
                    compared.run(study, folder, reused, command, mirror)
                else:
                    works = experiments.make(
                        study, folder, reused, command, mirror=mirror
                    )
                    experiments.agree(works, folder, shared=mirror is None)
                    found, pages = experiments.run(works, folder)
                    if environment.is_primary():
                        telling.ending(found, pages, study, folder, command, place)

    return programs.exit_code(program)


def _local(field: str, place: str, *, needed: bool = True) -> pathlib.Path:
    """A run directory, or a copy of the finished stages of one that a URL names.

    Args:
      field: that holds it, for messages.
      place: folder or URL.
      needed: whether there must be a finished stage.
    """
    if files.is_url(place):
        return mirrors.finished_stages(f"{field} = {place}", place, needed=needed)
    return pathlib.Path(place)


def _check_alone(study: Settings, url: str) -> None:
    """Check that one process alone compares methods in a store: they share stages.

    Raises:
      ConfigError: several do.
    """
    if url and study.compare and processes.several():
        raise errors.ConfigError(
            f"--workdir = {url}: must be a folder that all processes see for compare ="
            f" {study.compare!r}"
        )


def _time_limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """How long processes wait for each other, before the settings are checked."""
    group = config.get("compute")
    if not isinstance(group, Mapping):
        return {}
    kinds: dict[str, Any] = {"join_seconds": int, "silent_seconds": int | float}
    found: dict[str, Any] = {name: group.get(name) for name in kinds}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, kinds[name]) and 1 <= value <= _LONGEST
    }


def make_devices(*configs: Mapping[str, Any]) -> None:
    """As many as `compute.devices` asks for, before settings see which there are.

    Args:
      configs: nested settings of the studies that are about to run, not yet checked.
    """
    groups = [config.get("compute") for config in configs]
    asked = [group.get("devices") for group in groups if isinstance(group, Mapping)]
    numbers = [number for number in asked if isinstance(number, int)]
    if numbers and not processes.several():
        parallel.make_devices(max(numbers))


def prepare() -> None:
    """Log to stderr, and keep compiled programs: a second start compiles nothing."""
    tracking.configure_logging()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(files.cache() / "xla"))
    # The small ones too: by default programs that compile within a second are left out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
