"""Time that stages take, by what it is spent on, over all processes that ran them."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax.monitoring

from mosaic_jax.core import errors, files

KINDS = ("computing", "compiling", "waiting")
# Least number of seconds between two writes of a time sheet.
WRITE_EVERY = 1.0


class Stopwatch:
    """Measures the seconds since it was entered, and what they were spent on.

    Attributes:
      compiling: seconds of compilation by XLA.
      waiting: seconds of waiting for other processes or for the disk.
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
        """Stop measuring compilation and waiting."""
        self._running.remove(self)
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def spent(self) -> dict[str, float]:
        """Seconds so far: "compiling", "waiting", and the rest as "computing"."""
        total = time.monotonic() - self._start
        return {
            "computing": max(total - self.compiling - self.waiting, 0.0),
            "compiling": self.compiling,
            "waiting": self.waiting,
        }

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.compiling += duration_secs

    @classmethod
    @contextlib.contextmanager
    def waits(cls) -> Iterator[None]:
        """Count the time in this context as waiting, on every running stopwatch."""
        start = time.monotonic()
        try:
            yield
        finally:
            for watch in cls._running:
                watch.waiting += time.monotonic() - start


class TimeSheet:
    """Seconds that all processes spent on a stage, kept on disk while it runs."""

    def __init__(
        self,
        path: pathlib.Path,
        watch: Stopwatch,
        *,
        identity: Mapping[str, Any],
        share: float,
        writes: bool,
    ) -> None:
        """Continue the time sheet of earlier processes, if there is one.

        Args:
          path: of the file.
          watch: measures this process's time on the stage.
          identity: of the stage; a file of another identity is ignored.
          share: of the watch's time that counts, in (0, 1]: studies of several seeds
            that run together divide it.
          writes: whether this process writes the file.
        """
        self._path, self._watch, self._share = path, watch, share
        self._identity = dict(identity)
        self._writes = writes
        self._written = time.monotonic()
        try:
            saved = files.read_json(path)
        except errors.CheckpointError:  # none, or cut off by a crash
            saved = {}
        same = saved.get("identity") == self._identity
        earlier = saved["spent"] if same else {}
        self._earlier = {kind: earlier.get(kind, 0.0) for kind in KINDS}

    def spent(self) -> dict[str, float]:
        """Seconds of all processes by kind, see `Stopwatch.spent`."""
        now = self._watch.spent()
        return {k: self._earlier[k] + self._share * now[k] for k in KINDS}

    def write(self, *, always: bool = False) -> None:
        """Write the file; unless `always`, only if the last write is a second ago."""
        now = time.monotonic()
        if self._writes and (always or now - self._written >= WRITE_EVERY):
            content = {"identity": self._identity, "spent": self.spent()}
            files.write_json(self._path, content)
            self._written = now
