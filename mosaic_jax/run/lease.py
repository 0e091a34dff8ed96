"""Who writes to an object store: a lease there, renewed while its process lives.

Object stores have no locks. Two processes that write their leases in the same moment
both go on, until one reads, at its next renewal, that the lease is the other's.
"""

import json
import os
import platform
import threading
import time
from typing import Any

from mosaic_jax.core import errors
from mosaic_jax.run.object_store import ObjectStore

# The object that holds it: a local run directory has its lock under this name.
NAME = ".lock"
# Seconds between two renewals, and without one after which a lease is free.
RENEW_EVERY, OLD = 15.0, 60.0


class Lease:
    """The lease on a store, as one process sees it.

    Attributes:
      lost: what is to be said where another process has taken it over; "": none has.
    """

    def __init__(self, store: ObjectStore) -> None:
        """It is not taken yet."""
        self._store, self._over = store, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._me = f"{os.getpid()} on {platform.node()}"
        self._folder, self.lost = "", ""

    def last(self, folder: str) -> str:
        """The folder whose process held the lease last; "": none is known.

        Args:
          folder: identity of this process's own; no other process works in it now.

        Raises:
          ConfigError: a process with another folder holds the lease.
          StoreError: the store cannot be read.
        """
        held = self._read()
        if held is None:
            return ""
        age = time.time() - held["time"]
        if held["folder"] != folder and not held["released"] and age < OLD:
            raise errors.ConfigError(
                f"--workdir = {self._store.url}: in use by process {held['process']},"
                f" which was there {max(age, 0):.0f} s ago: must have ended, or be"
                f" silent for {OLD:.0f} s"
            )
        return held["folder"]

    def take(self, folder: str) -> None:
        """Hold the lease from now on.

        Args:
          folder: identity of this process's own.

        Raises:
          StoreError: the store cannot be written to.
        """
        self._folder = folder
        self._write()
        self._thread.start()

    def release(self) -> None:
        """End holding it; the folder stays known as the last.

        Raises:
          StoreError: the store cannot be reached; the lease ends by itself.
        """
        if not self._thread.is_alive():  # it was never taken
            return
        self._over.set()
        self._thread.join()
        if not self.lost:
            self._write(released=True)

    def check(self) -> None:
        """Look whether the lease is still this process's own, and renew it.

        Raises:
          StoreError: the store cannot be reached.
        """
        held = self._read()
        if held is not None and (held["folder"], held["process"]) != (
            self._folder,
            self._me,
        ):
            self.lost = f"process {held['process']} has taken {self._store.url} over"
        else:
            self._write()

    def _renew(self) -> None:
        while not self.lost and not self._over.wait(RENEW_EVERY):
            try:
                self.check()
            except errors.StoreError:  # whoever sends the next files will tell
                continue

    def _read(self) -> dict[str, Any] | None:
        """The lease; None: there is none, or the object is something else."""
        content = self._store.read(NAME)
        try:
            held = json.loads(content or b"")
            kinds = {"process": str, "folder": str, "time": float, "released": bool}
            good = all(isinstance(held[name], kind) for name, kind in kinds.items())
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return held if good else None

    def _write(self, *, released: bool = False) -> None:
        held = {
            "process": self._me,
            "folder": self._folder,
            "time": time.time(),
            "released": released,
        }
        self._store.write(NAME, json.dumps(held).encode())
