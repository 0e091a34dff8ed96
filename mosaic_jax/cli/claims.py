"""Who works on which study of a folder: several processes share one sweep.

A study is claimed by a lock on a file, which the kernel drops when its process ends,
however it ends; the processes may be on machines that share the folder.
"""

import contextlib
import fcntl
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import IO

from mosaic_jax.core import files

FOLDER = ".claims"


class Claims:
    """The studies of one folder, as one of the processes that work on them sees it."""

    def __init__(self, workdir: pathlib.Path) -> None:
        """Begin to work: what was settled before counts no more.

        Args:
          workdir: of the sweep; the claims lie in a folder of it.
        """
        self._folder = workdir / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        # By the clock of the file system, which the processes have in common.
        mark = self._folder / f"{uuid.uuid4()}.start"
        mark.touch()
        self._start = mark.stat().st_mtime_ns
        mark.unlink()

    @contextlib.contextmanager
    def take(self, needs: Mapping[str, set[str]]) -> Iterator[str | None]:
        """Claim the first study that nobody works on, nor on a stage that it needs.

        Args:
          needs: of each study that is not settled, the fingerprints of the stages that
            are not finished.

        Yields:
          Its name; None: all have to wait for other processes.
        """
        with contextlib.ExitStack() as held:
            # Nobody else looks meanwhile, so what is free stays free.
            with self.alone():
                taken = {name for name in needs if not self._free(name)}
                busy = set().union(*(needs[name] for name in taken))
                free = (name for name in needs if name not in taken)
                found = next((name for name in free if not needs[name] & busy), None)
                if found:
                    held.enter_context(self._lock(found))
            yield found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Do what only one of the processes may do at a time; the others wait."""
        with (self._folder / "lock").open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            yield

    def _free(self, name: str) -> bool:
        """Whether nobody has claimed the study."""
        try:
            self._lock(name).close()
        except BlockingIOError:
            return False
        return True

    def _lock(self, name: str) -> IO[str]:
        """The study's file, locked until it is closed.

        Raises:
          BlockingIOError: another process has locked it.
        """
        file = self._path(name, "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        return file

    def settle(self, name: str, failure: str = "") -> None:
        """Tell the others that a study is done.

        Args:
          name: of the study.
          failure: why it came to no end; "": it has finished.
        """
        files.write_bytes(self._path(name, "settled"), failure.encode())

    def settled(self, name: str) -> bool:
        """Whether some process has settled the study since this one began to work."""
        path = self._path(name, "settled")
        return path.exists() and path.stat().st_mtime_ns >= self._start

    def failure(self, name: str) -> str:
        """Why a study came to no end, as far as is known; "": it has finished."""
        path = self._path(name, "settled")
        return path.read_text() if path.exists() else "not finished yet"

    def _path(self, name: str, suffix: str) -> pathlib.Path:
        return self._folder / f"{name}.{suffix}"


def pause() -> None:
    """Wait a little for other processes."""
    time.sleep(1)
