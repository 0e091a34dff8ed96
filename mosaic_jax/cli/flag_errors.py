"""What is wrong with a command line, in one line that says what would be right."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mosaic_jax.core import errors

# Of a message by absl, or of Python's within it: what a value must be.
_MUST_BE = {
    "invalid literal for int()": "must be a whole number",
    "could not convert string to float": "must be a number",
    "Non-boolean argument": "must be true or false",
    "as a ConfigDict": "must be set field by field; mosaic list fields {name} prints"
    " them",
}
_VALUE = re.compile(
    r"flag --(?:config\.)?(?P<name>[^=\s]+)=(?P<value>.*?): (?P<why>.*)"
)
_UNKNOWN = re.compile(r"Unknown command line flag '(.*?)'")
_MISSING = re.compile(r"Missing value for flag (\S+)")


def check_fields(config: Mapping[str, Any], words: Sequence[str]) -> None:
    """Check that every --config.FIELD among `words` is a field of `config`.

    Raises:
      ConfigError: one is not; names the most similar one.
    """
    for word in words:
        flag = word.partition("=")[0]
        path = re.sub(r"\[.*", "", flag.lstrip("-").removeprefix("config."))
        if flag.startswith(("-config.", "--config.")) and not _has(config, path):
            hint = most_similar(config, path)
            raise errors.ConfigError(f"--config.{path}: unknown field, {hint}")


def most_similar(config: Mapping[str, Any], path: str) -> str:
    """A hint for the unknown field `path`: the field of `config` that it may mean."""
    match = difflib.get_close_matches(path, list(_leaves(config)), n=1)
    return f"did you mean {match[0]!r}?" if match else "mosaic list fields has all"


def _has(config: Mapping[str, Any], path: str) -> bool:
    group: Any = config
    for name in path.split("."):
        if not isinstance(group, Mapping) or name not in group:
            return False
        group = group[name]
    return True


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def line(error: Exception) -> str:
    """The message of what absl or ml_collections raised for a wrong flag, mended."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    if found := _VALUE.match(text):
        must_be = next((told for why, told in _MUST_BE.items() if why in text), "")
        if must_be:
            told = must_be.format(name=found["name"])
            return f"{found['name']} = {found['value']!r}: {told}"
        return f"--{found['name']} = {found['value']!r}: {found['why']}"
    if found := _UNKNOWN.match(text):
        return f"--{found[1]}: no such flag; mosaic run --help has all"
    if found := _MISSING.match(text):
        return f"{found[1]}: must have a value, {found[1]}=VALUE"
    return text
