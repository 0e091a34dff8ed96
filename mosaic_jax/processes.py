"""Several processes of one study: they start alike, and none is left waiting.

They talk over the key-value store of `jax.distributed`, which needs no device and works
while another process is stuck in a computation that will never end.
"""

import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the store has no public name

from mosaic_jax import errors, programs

# Seconds between two looks for a process that gave up.
LOOK_EVERY = 0.5
# Seconds that the coordinator outlives the others at most, whose store it keeps.
LAST_TO_LEAVE = 10.0
# Milliseconds that another's answer may take; a process that died is noticed earlier.
_ANSWER = 24 * 3600 * 1000
_numbers = itertools.count()
# Held by the one thread that ends this process.
_leaving = threading.Lock()

# Group of facts, such as "settings", to facts by name.
Facts = Mapping[str, Mapping[str, Any]]


def join(coordinator: str, num_processes: int, process_id: int) -> None:
    """Join the other processes of this study, before any device is used.

    Without arguments, SLURM's environment tells; outside SLURM this is the only one.

    Raises:
      ConfigError: the arguments contradict each other or nobody answers.
    """
    if not coordinator:
        if num_processes != 1:
            raise errors.ConfigError(
                f"--coordinator = '': must be HOST:PORT for --num_processes ="
                f" {num_processes}"
            )
        # Of an srun step: an allocation alone starts no other process.
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            jax.distributed.initialize()
            _watch()
        return
    if not 0 <= process_id < num_processes:
        raise errors.ConfigError(
            f"--process_id = {process_id}: must be in [0, {num_processes - 1}] for"
            f" --num_processes = {num_processes}"
        )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise errors.ConfigError(f"--coordinator = {coordinator}: {reason}") from error
    _watch()


def several() -> bool:
    """Whether other processes have been joined."""
    return distributed.global_state.client is not None and _count() > 1


def exchange(value: Any) -> list[Any]:
    """`value`, JSON-able, of every process in order; all must call this as often."""
    if not several():
        return [value]
    store, number = distributed.global_state.client, next(_numbers)
    store.key_value_set(f"mosaic_jax/{number}/{_index()}", json.dumps(value))
    keys = [f"mosaic_jax/{number}/{i}" for i in range(_count())]
    return [json.loads(store.blocking_key_value_get(key, _ANSWER)) for key in keys]


def agree(facts: Facts) -> None:
    """Check that every process knows the same facts.

    Raises:
      ConfigError: in each process, if not; of the first group that differs, a line for
        each fact, with its values and the processes.
    """
    found = exchange({"name": _name(), "facts": facts})
    names, known = [one["name"] for one in found], [one["facts"] for one in found]
    for group in known[0]:
        lines = _differences([one.get(group, {}) for one in known], names)
        if lines:
            raise errors.ConfigError("\n".join(lines))


def _differences(known: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line for each fact of which not all processes know the same."""
    lines = []
    for fact in sorted(set().union(*known)):
        values: dict[str, list[str]] = {}
        for one, name in zip(known, names, strict=True):
            value = json.dumps(one[fact]) if fact in one else "nothing"
            values.setdefault(value, []).append(name)
        if len(values) > 1:
            told = ", ".join(f"{v} in {_listed(who)}" for v, who in values.items())
            lines.append(f"{fact} = {told}: must be the same in every process")
    return lines


def _listed(names: list[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return " and ".join(names[:2]) + more


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error here ends the other processes too: none waits for one that is gone."""
    try:
        yield
    except errors.Interrupted:  # all stop, after the same step
        raise
    except Exception as error:
        if not several():
            raise
        lines = programs.told(error)
        if lines:
            _give_up("\n".join(lines), 2)
        _give_up(traceback.format_exc(), 1)


def _give_up(message: str, code: int) -> NoReturn:
    """Print `message`, tell the other processes, and end this one."""
    with _leaving:
        print(message, file=sys.stderr, flush=True)
        lines = message.splitlines() or [""]
        told = f"{_name()} gave up: {lines[-1].removeprefix('error: ')}"
        _leave(code, told)


def _watch() -> None:
    """End this process soon after another one gave up."""
    threading.Thread(target=_look, daemon=True).start()


def _look() -> None:
    store = distributed.global_state.client
    while True:
        time.sleep(LOOK_EVERY)
        try:
            found = store.key_value_dir_get("mosaic_jax/gave_up/")
        except Exception:  # the store is gone: the study is over
            return
        if found:
            with _leaving:
                print(f"error: {found[0][1]}", file=sys.stderr, flush=True)
                _leave(2, "")


def _leave(code: int, reason: str) -> NoReturn:
    """End this process; `reason` is told to the others, unless they know.

    Nothing is cleaned up: that would wait for the others. What is on disk is whole.
    """
    store = distributed.global_state.client
    try:
        if reason:
            store.key_value_set(f"mosaic_jax/gave_up/{_index()}", reason)
        store.key_value_set(f"mosaic_jax/left/{_index()}", "")
        if _index() == 0:
            _wait(lambda: len(store.key_value_dir_get("mosaic_jax/left/")) == _count())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LAST_TO_LEAVE
    while time.monotonic() < end and not done():
        time.sleep(0.1)
    # The last of them has told so, and is about to end.
    time.sleep(0.2)


def _index() -> int:
    return distributed.global_state.process_id


def _count() -> int:
    return distributed.global_state.num_processes or 1


def _name() -> str:
    return f"process {_index()} on {platform.node()}"
