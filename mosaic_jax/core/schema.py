"""Settings of components: fields with a default, allowed values and a meaning.

A component is a frozen dataclass whose fields are its settings. The functions here
declare such fields, check a mapping against them and list them; nothing else in the
library repeats a field's name, default or range. A field with a plain default may have
any value of its type.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import flax.traverse_util

from mosaic_jax.core import errors

MAX_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Allowed values: a phrase that follows "must be", a test for the program."""

    phrase: str
    test: Callable[[Any], bool]


_ANYTHING = Allowed("any", lambda _: True)


def field(
    default: Any,
    phrase: str,
    test: Callable[[Any], bool],
    meaning: str,
    stands_for: Mapping[float, Any] | None = None,
) -> Any:
    """A field of a component.

    Args:
      default: value where a study sets none.
      phrase: the allowed values, as they follow "must be" in an error message.
      test: tells whether a value of the field's type is allowed.
      meaning: for `mosaic list fields`, in a few words.
      stands_for: numbers that may be given in place of others, which take their place
        before they are tested.
    """
    metadata = {
        "allowed": Allowed(phrase, test),
        "meaning": meaning,
        "stands_for": stands_for or {},
    }
    return dataclasses.field(default=default, metadata=metadata)


def at_least(low: float, default: float, meaning: str = "") -> Any:
    """A numeric field that must be >= `low`.

    Args:
      low: the smallest allowed value.
      default: value where a study sets none.
      meaning: for `mosaic list fields`, in a few words.
    """
    return field(default, f">= {low}", lambda x: x >= low, meaning)


def above(low: float, default: float, meaning: str = "") -> Any:
    """A numeric field that must be > `low`.

    Args:
      low: the bound, not allowed itself.
      default: value where a study sets none.
      meaning: for `mosaic list fields`, in a few words.
    """
    return field(default, f"> {low}", lambda x: x > low, meaning)


def between(low: float, high: float, default: float, meaning: str = "") -> Any:
    """A numeric field that must be in [low, high].

    Args:
      low: the smallest allowed value.
      high: the largest allowed value.
      default: value where a study sets none.
      meaning: for `mosaic list fields`, in a few words.
    """
    return field(default, f"in [{low}, {high}]", lambda x: low <= x <= high, meaning)


def below_one(default: float, meaning: str = "") -> Any:
    """A numeric field that must be in [0, 1)."""
    return field(default, "in [0, 1)", lambda x: 0 <= x < 1, meaning)


def one_of(names: Collection[str], default: str, meaning: str = "") -> Any:
    """A field that must be one of `names`.

    Args:
      names: the allowed values; looked up when a value is checked, so the collection
        may still grow after this call.
      default: value where a study sets none.
      meaning: for `mosaic list fields`, in a few words.
    """
    return dataclasses.field(
        default=default, metadata={"names": names, "meaning": meaning}
    )


def component(names: Collection[str], default: str, meaning: str = "") -> Any:
    """A field that names a component: one of `names`, or "package.module:Class".

    Args:
      names: of the components of this library; looked up when a value is checked.
      default: value where a study sets none.
      meaning: for `mosaic list fields`, in a few words.
    """
    return dataclasses.field(
        default=default, metadata={"component": names, "meaning": meaning}
    )


def anything(default: Any, meaning: str = "") -> Any:
    """A field that may have any value of its type."""
    return field(default, _ANYTHING.phrase, _ANYTHING.test, meaning)


class Group:
    """Base of settings that belong together: a frozen dataclass of such fields."""

    def problems(self, study: Any) -> Iterator[str]:
        """Contradictions with other settings of `study`, one error message each."""
        del study
        yield from ()


def allowed_of(field: dataclasses.Field) -> Allowed:
    """The allowed values of a dataclass field that a function above declared."""
    names = field.metadata.get("names")
    if names is not None:
        return Allowed(f"one of {', '.join(names)}", lambda x: x in names)
    known = field.metadata.get("component")
    if known is not None:
        return Allowed(
            f"one of {', '.join(known)}, or 'package.module:Class' of your own",
            lambda x: x in known or ":" in x,
        )
    return field.metadata.get("allowed", _ANYTHING)


def is_component(found: Any) -> bool:
    """Whether `found` is a frozen dataclass itself, not only derived from one."""
    params = isinstance(found, type) and vars(found).get("__dataclass_params__")
    return bool(params and params.frozen)


def settings_of(component: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a component that are its settings, in order of declaration."""
    return tuple(one for one in dataclasses.fields(component) if one.init)


def defaults(component: type) -> dict[str, Any]:
    """Default value of every field by name; groups of fields are nested dicts.

    Raises:
      ConfigError: a field has no default, or its type cannot be resolved.
    """
    found, kinds = {}, _types(component)
    for one in settings_of(component):
        if group := _group(kinds[one.name]):
            found[one.name] = defaults(group)
        elif one.default is not dataclasses.MISSING:
            found[one.name] = one.default
        elif one.default_factory is not dataclasses.MISSING:
            found[one.name] = one.default_factory()
        else:
            raise errors.ConfigError(
                f"{component.__qualname__}.{one.name}: has no default: must have one"
            )
    return found


def check(component: type, mapping: Any, path: str = "") -> Any:
    """A component from a mapping of its fields; fields left out have their defaults.

    Args:
      component: a frozen dataclass of settings.
      mapping: field names to values; groups of fields are nested mappings.
      path: dotted name of the mapping within a study's settings, for messages.

    Raises:
      ConfigError: `component` is no frozen dataclass, or has a field without a default,
        or the mapping has problems; one line per problem, such as
        "distill.temperature = -1.0: must be > 0".
    """
    if not is_component(component):
        name = getattr(component, "__qualname__", component)
        raise errors.ConfigError(f"{name}: must be a frozen dataclass")
    defaults(component)  # every field must have one
    problems: list[str] = []
    result = _build(component, mapping, f"{path}." if path else "", problems)
    if problems:
        raise errors.ConfigError("\n".join(problems))
    return result


def to_mapping(group: Any) -> dict[str, Any]:
    """Settings, or a group of them, as a nested plain dict."""
    return dataclasses.asdict(group)


def flat(group: Any) -> dict[str, Any]:
    """Every field of nested settings by dotted name, those of mappings too."""
    return flax.traverse_util.flatten_dict(to_mapping(group), sep=".")


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name, after `prefix`, and the value of each field of nested settings.

    A field that holds a mapping counts as one field.
    """
    for one in settings_of(type(group)):
        value = getattr(group, one.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value


def digest(value: Any) -> str:
    """Hex sha256 of a value that JSON can represent."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def near(name: str, known: Collection[str]) -> str:
    """A hint for an unknown `name`: the most similar known one, else all of them."""
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"did you mean '{match[0]}'?"
    return f"known: {', '.join(known)}"


def is_covered(name: str, declared: Collection[str]) -> bool:
    """Whether the dotted field `name`, or a group that contains it, is declared."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in declared for i in range(len(parts)))


class UndeclaredError(AttributeError):
    """A stage reads a setting, or uses a component, that it did not declare."""


class View:
    """The settings that a stage declared, plus those that cannot change a result.

    Groups and fields are attributes, as in the settings of the whole study.
    """

    def __init__(
        self,
        group: Any,
        declared: Collection[str],
        *,
        neutral: Collection[str] = (),
        prefix: str = "",
    ) -> None:
        """Restrict settings to some of their fields.

        Args:
          group: the settings, or a group of them.
          declared: dotted names of fields and groups that may be read.
          neutral: dotted names of those that may be read and cannot change a result.
          prefix: dotted name of `group` with a final dot, "" for the whole settings.
        """
        self._group, self._prefix = group, prefix
        self._declared, self._neutral = frozenset(declared), frozenset(neutral)

    def __getattr__(self, name: str) -> Any:
        """The field or group `name`.

        Raises:
          UndeclaredError: it is not in this view.
        """
        full, value = self._prefix + name, getattr(self._group, name)
        shown = self._declared | self._neutral
        if is_covered(full, shown):
            return value
        if any(one.startswith(f"{full}.") for one in shown):
            return View(value, self._declared, neutral=self._neutral, prefix=f"{full}.")
        raise UndeclaredError(
            f"{full} is read by a stage that does not declare it: name it in the"
            " stage's `reads`"
        )

    def content(self) -> dict[str, Any]:
        """Value of every declared field that may change a result, by dotted name."""
        return {
            name: value
            for name, value in leaves(self._group)
            if is_covered(name, self._declared) and not is_covered(name, self._neutral)
        }


@functools.cache  # of most of the time that checking settings takes
def _types(component: type) -> dict[str, Any]:
    """Type of every field by name, also where a module keeps annotations as text."""
    try:
        return typing.get_type_hints(component)
    except Exception as error:  # whatever evaluating them raises
        raise errors.ConfigError(
            f"{component.__qualname__}: {type(error).__name__}: {errors.reason(error)}:"
            " types of fields must be importable when the study runs"
        ) from error


def _group(kind: Any) -> type | None:
    """The type of a field if it is a group of fields, else None."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind
    return None


def _build(cls: type, mapping: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{path[:-1]} = {mapping!r}: must be a group of fields")
        return None
    fields, kinds = {one.name: one for one in settings_of(cls)}, _types(cls)
    for name in mapping:
        if name not in fields:
            hint = near(str(name), list(fields))
            problems.append(f"{path}{name}: unknown field, {hint}")
    values = {}
    for name, one in fields.items():
        kind = kinds[name]
        if group := _group(kind):
            given = mapping.get(name, {})
            values[name] = _build(group, given, f"{path}{name}.", problems)
        elif name in mapping:
            value = _converted(kind, mapping[name])
            if isinstance(value, float):
                value = one.metadata.get("stands_for", {}).get(value, value)
            values[name] = value
            if wrong := _problem(allowed_of(one), kind, value):
                problems.append(f"{path}{name} = {value!r}: must be {wrong}")
    return None if problems else cls(**values)


def _members(kind: Any) -> tuple[Any, ...]:
    """The types that a union allows; of another type, that type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _converted(kind: Any, value: Any) -> Any:
    """`value`, a whole number as a float where only floats are allowed."""
    members = _members(kind)
    if type(value) is int and float in members and int not in members:
        return float(value)
    return value


def _problem(allowed: Allowed, kind: Any, value: Any) -> str:
    """What a value of a field must be instead; "" if it is allowed."""
    members = _members(kind)
    if not any(_is_of(value, one) for one in members):
        names = " or ".join(map(_type_name, members))
        return f"{names}, not {type(value).__name__}"
    if type(value) is int and abs(value) > MAX_INT:
        return f"in [-{MAX_INT}, {MAX_INT}]"
    if type(value) is float and not math.isfinite(value):
        return "finite"
    try:
        return "" if allowed.test(value) else allowed.phrase
    except Exception:  # a comparison of None with a number, say
        return allowed.phrase


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type that is no union; elements are not looked at."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is Any or not isinstance(origin, type):
        return True
    if origin.__module__ == "builtins":  # a bool is no int
        return type(value) is origin
    return isinstance(value, origin)


def _type_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) else str(kind)
