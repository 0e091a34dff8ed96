"""Values of fields as `mosaic sweep` takes them: several of a grid, or one for all."""

import ast
import contextlib
import math
from typing import Any

from mosaic_jax.cli import flag_errors
from mosaic_jax.core import errors

# What a value of each type is called in messages.
TYPES = {bool: "true or false", int: "a whole number", float: "a number"}
# Fields that are the same in every cell, with what to do instead.
NOT_IN_A_GRID = {
    "seeds": "must be the option --seeds",
    "compare": "must be cells of one method each: --grid init.method=fedavg,fedprox",
}


def swept(argument: str, config: dict[str, Any]) -> tuple[str, list[Any]]:
    """FIELD=VALUE,VALUE,... with values of the field's type.

    Raises:
      ConfigError: the field is unknown or none of a grid, or a value is not of its
        type.
    """
    field, equals, text = argument.partition("=")
    if not equals or not text:
        raise errors.ConfigError(
            f"--grid = {argument!r}: must be FIELD=VALUE,VALUE,..., such as"
            " distill.steps=100,200"
        )
    default = _default("--grid", field, config)
    if isinstance(default, tuple | list):
        values = _literal(f"[{text}]") or []
        if not values:
            raise errors.ConfigError(
                f"--grid: {field} = {text[:40]!r}: must be VALUE,VALUE,... for one cell"
                " or (VALUE,...),(VALUE,...),... for several"
            )
        return field, values if isinstance(values[0], tuple | list) else [values]
    return field, [_value("--grid", field, word, default) for word in text.split(",")]


def _default(flag: str, field: str, config: dict[str, Any]) -> Any:
    """The value that `config` has for a dotted field, given after `flag`."""
    if field in NOT_IN_A_GRID:
        raise errors.ConfigError(f"{flag} = {field}: {NOT_IN_A_GRID[field]}")
    default: Any = config
    for name in field.split("."):
        if not isinstance(default, dict) or name not in default:
            hint = flag_errors.most_similar(config, field)
            raise errors.ConfigError(f"{flag}: unknown field {field}, {hint}")
        default = default[name]
    if isinstance(default, dict):
        raise errors.ConfigError(f"{flag} = {field}: must be a field, not a group")
    return default


def _value(flag: str, field: str, word: str, default: Any) -> Any:
    if isinstance(default, bool):
        if word.lower() in ("true", "false"):
            return word.lower() == "true"
    elif isinstance(default, str):
        return word
    else:
        value = _literal(word)
        if isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return type(default)(value)
        if isinstance(value, float) and isinstance(default, float):
            return value
        if word == "inf" and isinstance(default, float):
            return math.inf  # few fields have a meaning for it
    must_be = TYPES.get(type(default), f"of type {type(default).__name__}")
    raise errors.ConfigError(f"{flag}: {field} = {word[:40]!r}: must be {must_be}")


def fixed(word: str, config: dict[str, Any]) -> tuple[str, Any]:
    """--config.FIELD=VALUE, which is the same in every cell."""
    field, equals, text = word.removeprefix("--config.").partition("=")
    if not equals:
        raise errors.ConfigError(f"{word}: must be --config.FIELD=VALUE")
    default = _default("--config", field, config)
    if isinstance(default, str):  # also without a letter, or with commas
        return field, text
    if isinstance(default, tuple | list):
        value = _literal(text)
        if not isinstance(value, tuple | list):
            raise errors.ConfigError(f"{word}: must be (VALUE,...), as Python has it")
        return field, value
    return field, _value("--config", field, text, default)


def _literal(text: str) -> Any:
    """A Python literal; None where `text` is none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
