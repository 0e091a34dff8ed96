"""What time was spent on, by this process and by those before it."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import jax.monitoring

from mosaic_jax import errors, files

KINDS = ("computing", "compiling", "waiting")
# Seconds between two writings of a sheet.
WRITE_EVERY = 1.0


class Stopwatch:
    """Seconds since it was entered, and what they were spent on.

    Attributes:
      compiling: seconds that XLA compiled.
      waiting: seconds that this process waited for others, or for the disk.
    """

    _running: ClassVar[list["Stopwatch"]] = []

    def __enter__(self) -> "Stopwatch":
        """Start at 0."""
        self.compiling = self.waiting = 0.0
        self._start = time.monotonic()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Count no longer."""
        self._running.remove(self)
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def spent(self) -> dict[str, float]:
        """Seconds so far by "computing", which is the rest, "compiling", "waiting"."""
        total = time.monotonic() - self._start
        return {
            "computing": max(total - self.compiling - self.waiting, 0.0),
            "compiling": self.compiling,
            "waiting": self.waiting,
        }

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.compiling += duration

    @classmethod
    @contextlib.contextmanager
    def waits(cls) -> Iterator[None]:
        """Count what is done here as waiting, on every watch that runs."""
        start = time.monotonic()
        try:
            yield
        finally:
            for watch in cls._running:
                watch.waiting += time.monotonic() - start


class TimeSheet:
    """Seconds that all processes spent on one stage, kept on disk while it runs."""

    def __init__(
        self, path: pathlib.Path, watch: Stopwatch, *, share: float, writes: bool
    ) -> None:
        """Go on from what earlier processes left.

        Args:
          path: of the file.
          watch: of this process, on the stage.
          share: of this process's time that counts here: studies of several seeds that
            run together divide it.
          writes: whether this process, of several, keeps the file.
        """
        self._path, self._watch, self._share = path, watch, share
        self._writes = writes
        self._written = time.monotonic()
        try:
            earlier = files.read_json(path)
        except errors.CheckpointError:  # none, or cut off by a crash
            earlier = {}
        self._earlier = {kind: earlier.get(kind, 0.0) for kind in KINDS}

    def spent(self) -> dict[str, float]:
        """Seconds of all processes by kind."""
        now = self._watch.spent()
        return {k: self._earlier[k] + self._share * now[k] for k in KINDS}

    def write(self, *, always: bool = False) -> None:
        """Save it; without `always` only where the last writing is a second ago."""
        now = time.monotonic()
        if self._writes and (always or now - self._written >= WRITE_EVERY):
            files.write_json(self._path, self.spent())
            self._written = now
