"""A command line of Mosaic's published programs, as one of this library.

mosaic translate "main_mosaic.py --data_set CIFAR-10 --comm_round 80 --teacher_init"
mosaic translate "main_init.py --comm_round 300 --I 10" "main_mosaic.py --comm_round 80"

The programs are main_init.py and main_mosaic.py, whose two lines make one study, and
main_fedavg.py, main_fedprox.py, main_fedbn.py and main_fedrs.py. Flags that are not
given have the published defaults. What is printed can be pasted into a shell: flags
without a counterpart are comments. docs/translating.md lists all flags.
"""

import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax.cli import config_files, translations
from mosaic_jax.cli.translations import FLAGS, INIT, MOSAIC, PROGRAMS
from mosaic_jax.core import errors, schema
from mosaic_jax.run import methods, programs, settings

# Ends of the variants of configurations, by alpha.
_VARIANTS = {0.1: "_0.1", 1.0: "_1.0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the translation.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 0, or 2 for a user's error.
    """
    parser = programs.parser("translate", __doc__)
    parser.add_argument("line", nargs="+", help="a command line, in quotes")
    args = parser.parse_args(arguments)
    return programs.exit_code(lambda: print(translated(args.line)))


def translated(lines: Sequence[str]) -> str:
    """The commands `lines` as one of this library, with comments.

    Raises:
      ConfigError: a program or flag is unknown, a value is wrong, or the lines are not
        those of one study.
    """
    given = dict(map(parsed, lines))
    if len(given) < len(lines) or (len(given) > 1 and given.keys() != {INIT, MOSAIC}):
        raise errors.ConfigError(
            f"mosaic translate: {len(lines)} command lines: must be one, or one of"
            f" {INIT} and one of {MOSAIC}"
        )
    fields: dict[str, Any] = {}
    comments: list[str] = []
    for program in sorted(given):
        flags = translations.flags_of(program)
        values = {name: flag.default for name, flag in flags.items()} | given[program]
        for name, value in translations.fields_of(program, values).items():
            if fields.setdefault(name, value) != value:
                raise errors.ConfigError(
                    f"mosaic translate: {name} = {value!r} by {program}: must be"
                    f" {fields[name]!r}, as the other line has it"
                )
        comments += _comments(program, given[program])
    config = _config(PROGRAMS[next(iter(given))], fields)
    return "\n".join([*dict.fromkeys(comments), _command(config, fields)])


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The program of a command line, and the flags that are given, by name.

    Raises:
      ConfigError: a program or flag is unknown, or a value is wrong.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise errors.ConfigError(f"mosaic translate: {error}: {line!r}") from error
    if words and pathlib.PurePath(words[0]).name.startswith("python"):
        words = words[1:]
    program = pathlib.PurePath(words[0]).name if words else ""
    if program not in PROGRAMS:
        hint = schema.near(program, list(PROGRAMS))
        raise errors.ConfigError(
            f"mosaic translate: {program!r}: unknown program, {hint}"
        )
    flags, found, rest = translations.flags_of(program), {}, iter(words[1:])
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in flags:
            hint = schema.near(f"--{name}", [f"--{known}" for known in flags])
            raise errors.ConfigError(f"{program} {word}: unknown flag, {hint}")
        if isinstance(flags[name].default, bool):
            found[name] = True
            continue
        found[name] = _value(name, value if equals else next(rest, None))
    return program, found


def _value(name: str, text: str | None) -> Any:
    """The value of a flag from its text, of the type of the default.

    Raises:
      ConfigError: there is none, or it is none of the flag's.
    """
    flag = FLAGS[name]
    kind = type(flag.default)
    if flag.choices and text is not None:
        plain = {choice.replace("-", "").lower(): choice for choice in flag.choices}
        text = plain.get(text.replace("-", "").lower(), text)
    try:
        if text is None or (flag.choices and text not in flag.choices):
            raise ValueError
        return kind(text)
    except ValueError:
        of_kind = {int: "a whole number", float: "a number"}.get(kind, "given")
        allowed = ", ".join(flag.choices) or of_kind
        raise errors.ConfigError(f"--{name} = {text!r}: must be {allowed}") from None


def _comments(program: str, given: Mapping[str, Any]) -> Iterator[str]:
    """What has no counterpart, and which defaults of the program count."""
    flags = translations.flags_of(program)
    counting = {
        name
        for name, flag in flags.items()
        if any(translations.counts(program, field) for field in flag.fields)
    }
    for name, value in given.items():
        if name not in counting:
            shown = "" if value is True else f" {value}"
            note = f"{program} does not use it" if flags[name].fields else ""
            yield f"# --{name}{shown}: {note or flags[name].note}"
    missing = [
        f"--{name} {flag.default}"
        for name, flag in flags.items()
        if name in counting and name not in given
    ]
    if missing:
        yield f"# {program} has by default: {', '.join(missing)}"


def _config(method: str, fields: Mapping[str, Any]) -> str:
    """Name of the configuration in the form of the published code."""
    variant = "published" + _VARIANTS.get(fields["data.alpha"], "")
    if method == "mosaic":
        return f"{fields['data.name']}_mosaic:{variant}"
    return f"baselines:{fields['data.name']}:{method}:{variant}"


def _command(config: str, fields: Mapping[str, Any]) -> str:
    """The command, with the fields that the configuration has otherwise.

    Raises:
      ConfigError: the study is none that can be run here.
    """
    mapping = config_files.load(config).to_dict()
    settings.from_mapping(methods.changed(mapping, fields))
    of_config = dict(_flat(mapping, ""))
    changed = [f"--config.{k}={v}" for k, v in fields.items() if of_config[k] != v]
    return " \\\n    ".join([f"mosaic run --config {config}", *changed])


def _flat(mapping: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Fields of nested settings by dotted name."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield path + name, value


if __name__ == "__main__":
    sys.exit(main())
