"""The log's pace: a line where a run is silent for long, few where it says much."""

import collections
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)
# Seconds of silence before it is said what the run is doing.
SILENCE = 4.0


class Pulse(logging.Handler):
    """Says what is being done when nothing else of the library has spoken for a while.

    Compiling and measuring may take longer than a newcomer waits for a program that
    says nothing.
    """

    def __init__(
        self, doing: Callable[[], tuple[str, float]], silence: float = SILENCE
    ) -> None:
        """Not yet listening.

        Args:
          doing: what is being done, and since when by `time.monotonic`.
          silence: seconds without a line before one is written.
        """
        super().__init__()
        self._doing, self._silence = doing, silence
        self._over = threading.Event()
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Pulse":
        """Listen to the library's log from here on."""
        self._heard = time.monotonic()
        logging.getLogger("mosaic_jax").addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Listen and speak no more."""
        self._over.set()
        self._thread.join()
        logging.getLogger("mosaic_jax").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Note that something was said."""
        del record
        self._heard = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self._silence / 8):
            now = time.monotonic()
            if now - self._heard >= self._silence:
                what, since = self._doing()
                _log.info("%s, %.0f s", what, now - since)


class Sparse(logging.Filter):
    """Lets a few lines of one logger through in a second, and all of the others.

    A loop of short steps would else scroll everything else away; its records are in
    `metrics.jsonl` in any case.
    """

    def __init__(self, name: str, most: int = 5) -> None:
        """None has come yet.

        Args:
          name: of the logger.
          most: of its lines in a second.
        """
        super().__init__()
        self._name, self._times = name, collections.deque[float](maxlen=most)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        if record.name != self._name:
            return True
        times = self._times
        if len(times) == times.maxlen and record.created - times[0] < 1:
            return False
        times.append(record.created)
        return True
