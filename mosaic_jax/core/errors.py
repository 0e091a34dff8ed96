"""Errors that a user can cause; each message is one line that says how to fix it."""

import signal
from collections.abc import Mapping


class MosaicError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(MosaicError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(MosaicError):
    """A data set is missing, damaged, or cannot be split as asked."""


class CheckpointError(MosaicError):
    """A saved artifact is missing, damaged, or belongs to another study."""


class ForeignError(CheckpointError):
    """A saved artifact is intact but belongs to another study."""


class StoreError(MosaicError):
    """An object store cannot be reached, or refuses to read or write."""


class DivergedError(MosaicError):
    """Training produced a loss or a parameter that is not finite."""


class SomeFailed(MosaicError):
    """Of several studies some came to no end; what the others found is there."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        """Say why, a line each.

        Args:
          failures: what stopped a study, by the study's name.
        """
        lines = [
            f"{name}: {line}"
            for name, told in failures.items()
            for line in told.splitlines()
        ]
        super().__init__("\n".join(lines))


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int) -> None:
        """Remember the signal, which sets the exit code."""
        super().__init__(
            f"interrupted by {signal.Signals(signum).name}; state saved: the same"
            " command goes on from there"
        )
        self.signum = signum


def reason(error: BaseException) -> str:
    """First line of another library's error message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
