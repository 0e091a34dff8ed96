"""`config.json` of a run directory: settings, command, versions and device."""

import json
import logging
import pathlib
from collections.abc import Collection, Sequence

import flax.traverse_util

from mosaic_jax.core import errors, files, schema
from mosaic_jax.run import environment
from mosaic_jax.run.settings import NEUTRAL, Settings

_log = logging.getLogger(__name__)

NAME = "config.json"


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
    # As JSON represents them: tuples become lists.
    new = json.loads(json.dumps(schema.to_mapping(settings)))
    ignored = {"data.dir", "model.start"}
    defaults = schema.flat(Settings())
    for group in ("method", "seed", "data", "model"):
        before = flax.traverse_util.flatten_dict({group: old.get(group)}, sep=".")
        after = flax.traverse_util.flatten_dict({group: new[group]}, sep=".")
        for name in sorted(after.keys() - ignored):
            # A field that is newer than the run had its default there.
            if before.get(name, defaults.get(name)) != after[name]:
                hint = ""
                if name == "model.dtype":
                    hint = f"; --config.model.dtype={before.get(name)} goes on with it"
                raise errors.ConfigError(
                    f"--workdir = {workdir}: holds another study, with {name} ="
                    f" {before.get(name)!r} where this one has {after[name]!r}: must be"
                    f" a new folder or the same study{hint}"
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
    before = flax.traverse_util.flatten_dict(saved, sep=".")
    after = json.loads(json.dumps(schema.flat(settings)))
    defaults = schema.flat(Settings())
    for name in sorted(after):
        was = before.get(name, defaults.get(name))
        if was != after[name] and not schema.is_covered(name, {*NEUTRAL, *but}):
            raise errors.ConfigError(
                f"--workdir = {workdir}: was run with {name} = {was!r} where this study"
                f" has {after[name]!r}: must be run again, or in a new folder"
            )
