"""Signals that ask a run to stop: followed where its state can be saved."""

import logging
import signal
import threading

from mosaic_jax.run import programs

_log = logging.getLogger(__name__)


class Interruption:
    """Records SIGINT, SIGTERM and SIGHUP; a second signal ends the process.

    A signal that the process was started to ignore, as by nohup, stays ignored. Only
    the main thread of a process can handle signals: in another none is recorded.
    """

    def __init__(self) -> None:
        """No signal has come yet."""
        self.signum = 0

    def __enter__(self) -> "Interruption":
        """Install the handlers."""
        handles = threading.current_thread() is threading.main_thread()
        self._previous = {
            signum: signal.signal(signum, self._handle)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if handles and signal.getsignal(signum) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Put the previous handlers back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        self.signum = signum
        _log.warning("stopping after the current step; signal again to stop at once")
        programs.farewell()  # a second signal ends this process without a word
        signal.signal(signum, signal.SIG_DFL)
