"""Every field of a configuration with its value, and which differ from the defaults.

mosaic show digits_mosaic
mosaic show digits_mosaic distill
mosaic show configs/cifar10_mosaic.py:paper --changed
mosaic show digits_mosaic --config.data.alpha=0.1
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax.cli import list as listing
from mosaic_jax.cli import run
from mosaic_jax.core import errors, schema
from mosaic_jax.run import programs, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 0, or 2 for a user's error.
    """
    parser = programs.parser("show", __doc__)
    parser.add_argument("config", help="as of mosaic run")
    parser.add_argument("group", nargs="?", default="", help="only fields in it")
    parser.add_argument(
        "--changed", action="store_true", help="only those that are no defaults"
    )
    given = sys.argv[1:] if arguments is None else arguments
    args, fields = parser.parse_known_args(_joined(given))

    def program() -> None:
        words = ["--config", args.config, *fields]
        config = run.parse(words).config.to_dict()
        settings.from_mapping(config)  # what could not be run is an error here too
        print("\n".join(_lines(config, args.group, changed=args.changed)))

    return programs.exit_code(program)


def _joined(words: Sequence[str]) -> list[str]:
    """`words` with --config.FIELD VALUE as one: VALUE is no group."""
    fields = listing.fields()
    switches = {f"--config.{name}" for name, _, old in fields if isinstance(old, bool)}
    joined = [""]
    for word in words:
        before = joined[-1]
        waits = before.startswith("--config.") and "=" not in before
        if waits and before not in switches and not word.startswith("--"):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined[1:]


def _lines(config: Mapping[str, Any], group: str, *, changed: bool) -> Iterator[str]:
    """A line for each field: its value, and the default where that is another one.

    Raises:
      ConfigError: there is no such group.
    """
    found = dict(_values(config))
    inside = {name for name in found if not group or schema.is_covered(name, {group})}
    if not inside:
        groups = sorted({name.partition(".")[0] for name in found})
        raise errors.ConfigError(
            f"mosaic show CONFIG {group}: {schema.near(group, groups)}"
        )
    differ = {name for name, (value, default) in found.items() if value != default}
    for name, (value, default) in found.items():
        if name in differ & inside:
            yield f"* {name} = {value!r}    (default {default!r})"
        elif name in inside and not changed:
            yield f"  {name} = {value!r}"
    yield f"{len(differ & inside)} of {len(inside)} fields differ from their defaults"


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Value and default of each field by its dotted name."""
    for name, _, default in listing.fields():
        value: Any = config
        for part in name.split("."):
            value = value.get(part, default) if isinstance(value, Mapping) else default
        yield name, (value, default)


if __name__ == "__main__":
    sys.exit(main())
