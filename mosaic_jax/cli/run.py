"""Run a study: mosaic run --config digits_mosaic --workdir runs/digits_mosaic.

--config takes a file, PATH.py or PATH.py:VARIANT, or the name of one that comes with
the library. Running the same command again goes on where it stopped.

Any field can be set on the command line, after --config: --config.distill.steps=200.
Those of your own algorithm, server method or stage too:
--config.methods.CLASS.FIELD=VALUE.

  mosaic list configs           the configurations that come with the library
  mosaic show digits_mosaic     every field of one, and which differ from the defaults
  mosaic list fields distill    what fields mean and may be
"""

import itertools
import pathlib
import sys
import textwrap
from collections.abc import Sequence

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from absl import flags
from ml_collections import config_flags

from mosaic_jax.cli import config_files, flag_errors, own_parts
from mosaic_jax.core import errors
from mosaic_jax.run import programs

_HELP = {"--help", "--helpfull", "-h"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and report.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 0, 2 for a user's error, 128 + the signal that interrupted it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if _HELP & set(words):
        print(f"{__doc__}\n{_help()}")
        return 0
    code = 0

    def program() -> None:
        nonlocal code
        try:
            given = parse(words)
        except errors.ConfigError as error:
            _tell_others(error, words)
            raise
        code = _run(given, words)

    return programs.exit_code(program) or code


def _tell_others(error: errors.ConfigError, words: Sequence[str]) -> None:
    """End here with an error that other processes hear of, if there are any."""
    found = flags.FlagValues()
    _define_processes(found)
    try:
        found([sys.argv[0], *words], known_only=True)
    except flags.Error:
        return
    from mosaic_jax.run import processes

    processes.tell_others(
        error, found.coordinator, found.num_processes, found.process_id
    )


def parse(words: Sequence[str]) -> flags.FlagValues:
    """The flags in `words`: `config`, a ConfigDict, `workdir` and the others.

    Raises:
      ConfigError: one of them is wrong, or the configuration is; one line says why.
    """
    config = config_files.load(config_argument(words))
    found = _defined(flags.FlagValues())
    others = [sys.argv[0], *programs.without(words, ["config"])]
    own = own_parts.add_defaults(config, own_parts.on_command_line(others))
    flag_errors.check_fields(config.to_dict(), others)
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=found, sys_argv=others
        )
        rest = found(others)
    except Exception as error:  # absl, ml_collections and fields raise what they like
        raise errors.ConfigError(flag_errors.line(error)) from error
    if len(rest) > 1:
        raise errors.ConfigError(f"{rest[1]}: must be a flag, such as --config")
    with found.config.unlocked():
        for group in own_parts.unused(found.config.to_dict(), own):
            del found.config.methods[group]
    return found


def config_argument(words: Sequence[str]) -> str:
    """The value of --config, "" if there is none."""
    for word, after in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name in ("--config", "-config"):
            return value or after
    return ""


def default_workdir(config: str) -> str:
    """runs/NAME or runs/NAME_VARIANT for path/NAME.py[:VARIANT]."""
    path, *variants = config.split(":")
    return "/".join(["runs", "_".join([pathlib.Path(path).stem, *variants])])


def _help() -> str:
    """A line for each flag; those of absl itself are of no use here."""
    found = _defined(flags.FlagValues())
    own = str(found.find_module_defining_flag("workdir"))
    defined = found.flags_by_module_dict()[own]
    lines = {"--config": "PATH.py, NAME, or either with :VARIANT."} | {
        f"--{flag.name}": flag.help.partition(";\n")[0] for flag in defined
    }
    width = max(map(len, lines))
    wrapped = [
        textwrap.wrap(text, 86 - width, break_on_hyphens=False)
        for text in lines.values()
    ]
    return "\n".join(
        f"  {name if not i else '':{width}}  {part}"
        for name, parts in zip(lines, wrapped, strict=True)
        for i, part in enumerate(parts)
    )


def _run(given: flags.FlagValues, words: Sequence[str]) -> int:
    # Imported here so that a wrong flag is answered at once.
    from mosaic_jax.cli import launch

    return launch.run(
        given.config.to_dict(),
        given.workdir or default_workdir(config_argument(words)),
        reuse_from=given.reuse_from,
        command=sys.argv,
        dry_run=given.dry_run,
        target=given.target,
        of_processes=(given.coordinator, given.num_processes, given.process_id),
    )


def _defined(found: flags.FlagValues) -> flags.FlagValues:
    """`found` with all flags but those of the configuration."""
    flags.DEFINE_string(
        "workdir",
        "",
        "Run directory, or the URL of one in an object store; by default runs/CONFIG.",
        flag_values=found,
    )
    flags.DEFINE_multi_string(
        "reuse_from",
        [],
        "Run directory or URL whose finished stages may be used; may be repeated.",
        flag_values=found,
    )
    flags.DEFINE_flag(
        _DryRun(
            "dry_run",
            "Only tell what the study would cost, at once by the shapes of its"
            " programs; --dry_run=measure: by a few steps of each loop.",
        ),
        flag_values=found,
    )
    flags.DEFINE_string(
        "target",
        "",
        "With --dry_run: the device to tell it for, such as h100 or v5e; by default"
        " those of this machine.",
        flag_values=found,
    )
    _define_processes(found)
    return found


def _define_processes(found: flags.FlagValues) -> None:
    """Flags that say which process of a study this is."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, where several run one study.",
        flag_values=found,
    )
    flags.DEFINE_integer("num_processes", 1, "Processes in all.", flag_values=found)
    flags.DEFINE_integer("process_id", 0, "Of this one, from 0.", flag_values=found)


class _HowToTell(flags.ArgumentParser):
    """Values of --dry_run: none, or how."""

    syntactic_help = "[measure]"

    def parse(self, argument: str) -> str:
        """The word for `launch.run`: "" for --nodry_run, "count" for no value."""
        known = {"": "", "false": "", "true": "count", "measure": "measure"}
        if argument not in known:
            raise ValueError("must be measure, or no value")
        return known[argument]


class _DryRun(flags.Flag):
    """A flag that needs no value."""

    def __init__(self, name: str, help_text: str) -> None:
        super().__init__(_HowToTell(), None, name, "", help_text, boolean=True)


if __name__ == "__main__":
    sys.exit(main())
