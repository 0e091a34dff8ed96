"""What there is: data sets, methods, networks, configurations, fields.

mosaic list
mosaic list methods
mosaic list fields distill
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax import configs
from mosaic_jax.core import errors, schema
from mosaic_jax.data.sources import SOURCES
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.attacks import ATTACKS
from mosaic_jax.fl.compression import COMPRESSORS
from mosaic_jax.fl.robust import RULES
from mosaic_jax.nn.networks import NETWORKS
from mosaic_jax.run import methods, programs, settings, variants
from mosaic_jax.run.settings import Settings
from mosaic_jax.server import METHODS

OWN = "or your own: package.module:Class"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print it.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 0, or 2 for a user's error.
    """
    parser = programs.parser("list", __doc__)
    parser.add_argument("what", nargs="?", choices=(*KINDS, "fields"))
    parser.add_argument("group", nargs="?", default="", help="of fields: those in it")
    args = parser.parse_args(arguments)
    return programs.exit_code(lambda: _print(args.what, args.group))


def _print(what: str | None, group: str) -> None:
    if what == "fields":
        print("\n".join(_field_lines(group)))
        return
    for i, kind in enumerate([what] if what else KINDS):
        rows = dict(KINDS[kind]())
        width = max(map(len, rows))
        print("\n" * bool(i) + f"{kind}")
        for name, told in rows.items():
            print(f"  {name:{width}}  {told}".rstrip())
    if not what:
        print("\nfields: mosaic list fields [GROUP]")


def _data() -> Iterator[tuple[str, str]]:
    for name, source in SOURCES.items():
        info = source.info
        if info is None:
            yield name, "your own images: --config.data.dir says where"
        else:
            shape = " x ".join(map(str, info.image_shape))
            yield name, f"{info.num_classes} classes, {shape}"
    yield "", "or your own: package.module:function"


def _methods() -> Iterator[tuple[str, str]]:
    yield "mosaic", "the teacher of class experts, distilled on generated images"
    for form, meaning in variants.MEANING.items():
        yield f"mosaic:{form}", meaning
    for name, component in ALGORITHMS.items():
        yield name, _first_line(component)
    for name, component in METHODS.items():
        yield name, _first_line(component)
    yield "A+B", "method A whose clients train by algorithm B, such as mosaic+fedrolex"
    for name, listed in methods.LISTS.items():
        yield name, f"the comparison of {', '.join(listed)}"
    yield "", OWN


def _networks() -> Iterator[tuple[str, str]]:
    for name, network in NETWORKS.items():
        yield name, _first_line(getattr(network, "func", network))
    yield "", OWN


def _components(kinds: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    for name, component in kinds.items():
        yield name, _first_line(component)
    yield "", OWN


def _configs() -> Iterator[tuple[str, str]]:
    for name, path in configs.shipped().items():
        docstring = path.read_text().partition('"""')[2]
        yield name, docstring.partition("\n")[0]


# What `mosaic list` prints: names with a line each.
KINDS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "data": _data,
    "methods": _methods,
    "networks": _networks,
    "rules": functools.partial(_components, RULES),
    "attacks": functools.partial(_components, ATTACKS),
    "compression": functools.partial(_components, COMPRESSORS),
    "configs": _configs,
}


def _first_line(component: Any) -> str:
    return (inspect.getdoc(component) or "").partition("\n")[0]


def fields() -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every field of a study: dotted name, field, default."""
    yield from _fields(Settings, "")
    for name, component in settings.components().items():
        yield from _fields(component, f"methods.{name}.")


def _fields(group: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    defaults = schema.defaults(group)
    for one in schema.settings_of(group):
        if dataclasses.is_dataclass(one.type) and isinstance(one.type, type):
            yield from _fields(one.type, f"{prefix}{one.name}.")
        elif one.name != "methods":  # the components tell theirs
            yield prefix + one.name, one, defaults[one.name]


def _field_lines(group: str) -> Iterator[str]:
    found = [
        (name, one, default)
        for name, one, default in fields()
        if not group or schema.is_covered(name, {group})
    ]
    if not found:
        known = {name.rpartition(".")[0] or name for name, _, _ in fields()}
        raise errors.ConfigError(
            f"mosaic list fields {group}: {schema.near(group, sorted(known))}"
        )
    for name, one, default in found:
        allowed = schema.allowed_of(one).phrase
        if allowed == "any":
            allowed = one.type.__name__ if isinstance(one.type, type) else str(one.type)
        meaning = one.metadata.get("meaning", "")
        yield f"{name} = {default!r}"
        yield f"    {'; '.join(filter(None, [allowed, meaning]))}"


if __name__ == "__main__":
    sys.exit(main())
