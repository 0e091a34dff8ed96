"""Signs of life that the processes of one study send: a lost one ends the others."""

import atexit
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence

from mosaic_jax.run import peers

# Seconds between two checks whether another process has given up.
LOOK_EVERY = 0.5
# Signs that are sent in the time after which a process counts as lost.
_SIGNS = 10
# Keys of the store.
_ALIVE, _THROUGH = "mosaic_jax/alive/", "mosaic_jax/through/"


class Signs:
    """The signs of all processes, as this one sees them."""

    def __init__(self, silent_seconds: float, num_processes: int) -> None:
        """Nothing is sent yet.

        Args:
          silent_seconds: without a sign after which a process counts as lost.
          num_processes: of the study.
        """
        self.silent_seconds = silent_seconds
        now = time.monotonic()
        # When the store last answered; None: the study is over.
        self._answered: float | None = now
        # When signs were last looked at, and whether this process is about to end.
        self._looked, self._ending = now, False
        # Of each process its name, the last sign, and when that was new.
        self._heard = {
            f"{_ALIVE}{i}": (f"process {i}", -1, now) for i in range(num_processes)
        }
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=run, daemon=True)
            for run in (self._exchange, self._check_coordinator)
        ]

    def start(self) -> None:
        """From now on this process ends soon after another gave up or fell silent."""
        # Runs before JAX's own, after which the store is gone.
        atexit.register(self._end)
        for thread in self._threads:
            thread.start()

    def wait_for_lost(self) -> None:
        """Wait for so long that a process that is lost now has ended this one."""
        time.sleep(self.silent_seconds + 10 * LOOK_EVERY)

    def _end(self) -> None:
        """Wait until all processes are through, then send no more signs.

        One may still draw a report while the others have nothing left to do. From now
        on the store may go at any time. Python aborts if it ends while a thread is
        inside the store, so both threads end first.
        """
        self._ending = True
        with contextlib.suppress(Exception):
            peers.store().key_value_set(f"{_THROUGH}{peers.index()}", "")
            while len(peers.store().key_value_dir_get(_THROUGH)) < len(self._heard):
                time.sleep(LOOK_EVERY)
        self._over.set()
        for thread in self._threads:
            thread.join(10 * LOOK_EVERY)

    def _exchange(self) -> None:
        """Send signs, and end this process if another gave up or sends none."""
        sent = 0.0
        for beat in itertools.count():
            if self._over.is_set():
                return
            try:
                self._follow_others()
                if time.monotonic() - sent > self.silent_seconds / _SIGNS:
                    self._send(beat)
                    sent = time.monotonic()
            except Exception:
                if self._ending:
                    self._answered = None
                    return
                # `_check_coordinator` says how long this may go on.
            else:
                self._answered = time.monotonic()
            self._over.wait(LOOK_EVERY)

    def _follow_others(self) -> None:
        if reasons := peers.store().key_value_dir_get(peers.GAVE_UP):
            peers.leave(f"error: {reasons[0][1]}", 2)

    def _send(self, beat: int) -> None:
        store, me = peers.store(), peers.index()
        sign = json.dumps([peers.name(me), beat])
        store.key_value_set(f"{_ALIVE}{me}", sign, allow_overwrite=True)
        if lost := self.lost(dict(store.key_value_dir_get(_ALIVE))):
            reason = (
                f"{listed(lost)} {'has' if len(lost) == 1 else 'have'} sent no sign of"
                f" life for {self.silent_seconds:g} s (compute.silent_seconds): killed,"
                " stopped or cut off; the same command resumes"
            )
            peers.leave(f"error: {reason}", 2, tell=reason, lost=len(lost))

    def lost(self, signs: Mapping[str, str]) -> list[str]:
        """Names of the processes whose last sign is too old.

        Args:
          signs: the last one of each process, as the store has them.
        """
        now, before = time.monotonic(), self._looked
        self._looked = now
        # After a stop of this process the others, stopped too perhaps, get their time.
        stopped = now - before > self.silent_seconds / 2
        for key, sign in signs.items():
            name, beat = json.loads(sign)
            if stopped or self._heard[key][1] != beat:
                self._heard[key] = name, beat, now
        return [
            name
            for name, _, since in self._heard.values()
            if now - since > self.silent_seconds
        ]

    def _check_coordinator(self) -> None:
        """End this process if the store, which process 0 keeps, does not answer."""
        looked = time.monotonic()
        while self._answered is not None and not self._over.wait(LOOK_EVERY):
            now, before, answered = time.monotonic(), looked, self._answered
            looked = now
            if now - before > self.silent_seconds / 2:
                # It is this process that was stopped: the others may well be there.
                self._answered = answered and now
            elif answered and now - answered > self.silent_seconds:
                peers.leave_alone(
                    "error: process 0, which keeps the processes together, has not"
                    f" answered for {self.silent_seconds:g} s"
                    " (compute.silent_seconds); the same command resumes",
                    2,
                )


def listed(names: Sequence[str]) -> str:
    """The first two names, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return " and ".join(names[:2]) + more
