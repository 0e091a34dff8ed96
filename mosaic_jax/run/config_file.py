"""`config.json` of a run directory: settings, command, versions and device."""

import json
import logging
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util

from mosaic_jax.core import errors, files, schema
from mosaic_jax.run import environment
from mosaic_jax.run.settings import NEUTRAL, Settings

_log = logging.getLogger(__name__)

NAME = "config.json"
# What may not change within a run directory.
_OF_A_STUDY = ("method", "seed", "data", "model")


def write(workdir: pathlib.Path, settings: Settings, command: Sequence[str]) -> None:
    """Write the file.

    Args:
      workdir: run directory.
      settings: of the study.
      command: the command line that started the study.
    """
    files.write_json(
        workdir / NAME,
        {
            "settings": schema.to_mapping(settings),
            "command": list(command),
            "versions": environment.versions(),
            "device": environment.device(),
            "git_revision": environment.git_revision(),
        },
    )


def check_same_study(workdir: pathlib.Path, settings: Settings) -> None:
    """Check that a run directory belongs to this study, if it is in use at all.

    Settings of stages may change within a run directory. Method, seed, data and model
    may not.

    Raises:
      ConfigError: `workdir` holds another study; names the first field that differs.
    """
    path = workdir / NAME
    if not path.exists():
        return
    try:
        old = files.read_json(path)["settings"]
    except (errors.CheckpointError, KeyError):
        _log.warning("%s is damaged; it is written anew", path)
        return
    ignored = {"data.dir", "model.start"}
    for name, was, now in _differing(old, settings):
        if schema.is_covered(name, _OF_A_STUDY) and name not in ignored:
            hint = ""
            if name == "model.dtype":
                hint = f"; --config.model.dtype={was} goes on with it"
            raise errors.ConfigError(
                f"--workdir = {workdir}: holds another study, with {name} = {was!r}"
                f" where this one has {now!r}: must be a new folder or the same"
                f" study{hint}"
            )


def check_same_settings(
    workdir: pathlib.Path, settings: Settings, but: Collection[str] = ()
) -> None:
    """Check that the latest run in a directory had these settings.

    Those that cannot change a result may differ.

    Args:
      workdir: run directory.
      settings: of the study.
      but: fields that may differ too.

    Raises:
      CheckpointError: the file is damaged.
      ConfigError: there was no run, or another one; names the first field that differs.
    """
    path = workdir / NAME
    if not path.exists():
        raise errors.ConfigError(f"--workdir = {workdir}: nothing was run there")
    saved = files.read_json(path).get("settings", {})
    for name, was, now in _differing(saved, settings):
        if not schema.is_covered(name, {*NEUTRAL, *but}):
            raise errors.ConfigError(
                f"--workdir = {workdir}: was run with {name} = {was!r} where this study"
                f" has {now!r}: must be run again, or in a new folder"
            )


def _differing(
    saved: Mapping[str, Any], settings: Settings
) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ, those of a study first: name, value saved, value now."""
    before = flax.traverse_util.flatten_dict(dict(saved), sep=".")
    # As JSON represents them: tuples become lists.
    after = json.loads(json.dumps(schema.flat(settings)))
    defaults = schema.flat(Settings())
    for name in sorted(after, key=lambda name: (_place(name), name)):
        # A field that is newer than the run had its default there.
        was = before.get(name, defaults.get(name))
        if was != after[name]:
            yield name, was, after[name]


def _place(name: str) -> int:
    group = name.partition(".")[0]
    return _OF_A_STUDY.index(group) if group in _OF_A_STUDY else len(_OF_A_STUDY)
