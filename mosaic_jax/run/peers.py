"""The processes of one study as one of them sees the others, and how it leaves them.

They communicate by the key-value store of `jax.distributed`. It needs no device, and it
works while another process is stuck in a computation that will never end.
"""

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from jax._src import distributed  # the store has no public name

from mosaic_jax.run.last_words import LastWords

# Keys of the store: why processes gave up, how many they miss, and which have left.
GAVE_UP, _LEFT = "mosaic_jax/gave_up/", "mosaic_jax/left/"
_LOST = "mosaic_jax/lost/"
# Seconds that the coordinator, which keeps the store, waits for the others to end.
LAST_TO_LEAVE = 10.0
# Held by the one thread that ends this process.
_leaving = threading.Lock()
# What is printed if this process is killed; there once it joins others.
_last_words: LastWords | None = None


def several() -> bool:
    """Whether other processes have been joined."""
    return distributed.global_state.client is not None and count() > 1


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Number of this process."""
    return distributed.global_state.process_id


def name(number: int) -> str:
    """What the process of this machine that has this number is called."""
    return f"process {number} on {platform.node()}"


def store() -> Any:
    """The key-value store; only where `several`. JAX gives it no public type."""
    assert distributed.global_state.client is not None
    return distributed.global_state.client


def if_killed(line: str) -> None:
    """Have a line printed if this process ends and cannot print it itself."""
    global _last_words
    if _last_words is None:
        _last_words = LastWords(line)
    else:
        _last_words.change(line)


def leave(message: str, code: int, *, tell: str = "", lost: int = 0) -> NoReturn:
    """Print a message, tell the other processes, and end this one.

    Nothing is cleaned up, as that would wait for the others. Files are whole. The
    coordinator waits a little for the others to hear of it.

    Args:
      message: to be printed; "": it was printed already.
      code: exit code.
      tell: why this process gave up; "": the others know.
      lost: number of the others that are not waited for.
    """
    _begin_to_leave(message, code)
    try:
        if lost:
            store().key_value_set(f"{_LOST}{index()}", str(lost))
        if tell:
            store().key_value_set(f"{GAVE_UP}{index()}", tell)
        store().key_value_set(f"{_LEFT}{index()}", "")
        if index() == 0:
            # Whoever told this process to leave may have missed one before it did.
            missed = store().key_value_dir_get(_LOST)
            rest = count() - max((int(number) for _, number in missed), default=0)
            _wait(lambda: len(store().key_value_dir_get(_LEFT)) >= rest)
    finally:
        end(code)


def leave_alone(message: str, code: int) -> NoReturn:
    """Print a message and end this process: the others cannot be told."""
    _begin_to_leave(message, code)
    end(code)


def _begin_to_leave(message: str, code: int) -> None:
    # Another thread that leaves may wait for a store that never answers.
    if not _leaving.acquire(timeout=2 * LAST_TO_LEAVE):
        end(code)
    if message:
        print(message, file=sys.stderr, flush=True)


def end(code: int) -> NoReturn:
    """End this process at once."""
    if _last_words:
        _last_words.drop()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _wait(done: Callable[[], bool]) -> None:
    """Wait until `done`, at most `LAST_TO_LEAVE` seconds."""
    limit = time.monotonic() + LAST_TO_LEAVE
    while time.monotonic() < limit and not done():
        time.sleep(0.1)
    # The last process has only announced its end.
    time.sleep(0.2)
