"""Several processes that run one study: all start alike, and all fail together.

They communicate by the key-value store of `jax.distributed`. It needs no device, and it
works while another process is stuck in a computation that will never end.
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

from mosaic_jax.core import errors
from mosaic_jax.run import programs

# Seconds between two checks whether another process has given up.
LOOK_EVERY = 0.5
# Seconds that the coordinator, which keeps the store, waits for the others to end.
LAST_TO_LEAVE = 10.0
# Milliseconds to wait for another process; one that died is noticed earlier.
_ANSWER = 24 * 3600 * 1000
_numbers = itertools.count()
# Held by the one thread that ends this process.
_leaving = threading.Lock()

# Facts by name, in groups such as "settings".
Facts = Mapping[str, Mapping[str, Any]]


def join(coordinator: str, num_processes: int, process_id: int) -> None:
    """Join the other processes of this study; must be called before using any device.

    Without a coordinator, SLURM's environment names the processes; outside of SLURM
    this process is the only one.

    Args:
      coordinator: "HOST:PORT" of process 0, or "".
      num_processes: number of processes.
      process_id: number of this process, in [0, num_processes - 1].

    Raises:
      ConfigError: the arguments contradict each other, or the coordinator does not
        answer.
    """
    if not coordinator:
        if num_processes != 1:
            raise errors.ConfigError(
                f"--coordinator = '': must be HOST:PORT for --num_processes ="
                f" {num_processes}"
            )
        # Set by srun for its tasks; an allocation alone starts no other process.
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
    """The `value` of every process, in their order.

    All processes must call this the same number of times.

    Args:
      value: what JSON can represent.
    """
    if not several():
        return [value]
    store, number = _store(), next(_numbers)
    store.key_value_set(f"mosaic_jax/{number}/{_index()}", json.dumps(value))
    keys = [f"mosaic_jax/{number}/{i}" for i in range(_count())]
    return [json.loads(store.blocking_key_value_get(key, _ANSWER)) for key in keys]


def agree(facts: Facts) -> None:
    """Check that the facts are the same in every process.

    Raises:
      ConfigError: they are not; raised in every process. Of the first group that
        differs, each fact has a line with its values and the processes.
    """
    everyone = exchange({"name": _name(), "facts": facts})
    names = [process["name"] for process in everyone]
    known = [process["facts"] for process in everyone]
    for group in known[0]:
        lines = _differences([groups.get(group, {}) for groups in known], names)
        if lines:
            raise errors.ConfigError("\n".join(lines))


def _differences(known: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A line for each fact that is not the same in all processes."""
    lines = []
    for fact in sorted(set().union(*known)):
        values: dict[str, list[str]] = {}
        for facts, name in zip(known, names, strict=True):
            value = json.dumps(facts[fact]) if fact in facts else "nothing"
            values.setdefault(value, []).append(name)
        if len(values) > 1:
            listed = ", ".join(f"{v} in {_listed(who)}" for v, who in values.items())
            lines.append(f"{fact} = {listed}: must be the same in every process")
    return lines


def _listed(names: list[str]) -> str:
    """The first two names, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return " and ".join(names[:2]) + more


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """An error in this context ends the other processes as well."""
    try:
        yield
    except errors.Interrupted:  # all processes stop, after the same step
        raise
    except Exception as error:
        if not several():
            raise
        lines = programs.error_lines(error)
        if lines:
            _give_up("\n".join(lines), 2)
        _give_up(traceback.format_exc(), 1)


def _give_up(message: str, code: int) -> NoReturn:
    """Print `message`, tell the other processes, and end this one."""
    with _leaving:
        print(message, file=sys.stderr, flush=True)
        lines = message.splitlines() or [""]
        reason = f"{_name()} gave up: {lines[-1].removeprefix('error: ')}"
        _leave(code, reason)


def _watch() -> None:
    """End this process soon after another one gave up."""
    threading.Thread(target=_look, daemon=True).start()


def _look() -> None:
    """Check again and again whether another process gave up; then end this one."""
    store = _store()
    while True:
        time.sleep(LOOK_EVERY)
        try:
            reasons = store.key_value_dir_get("mosaic_jax/gave_up/")
        except Exception:  # the store is gone: the study is over
            return
        if reasons:
            with _leaving:
                print(f"error: {reasons[0][1]}", file=sys.stderr, flush=True)
                _leave(2, "")


def _leave(code: int, reason: str) -> NoReturn:
    """End this process, telling the others the `reason` unless it is "".

    Nothing is cleaned up, as that would wait for the others. Files are whole.
    """
    store = _store()
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
    """Wait until `done`, at most `LAST_TO_LEAVE` seconds."""
    end = time.monotonic() + LAST_TO_LEAVE
    while time.monotonic() < end and not done():
        time.sleep(0.1)
    # The last process has only announced its end.
    time.sleep(0.2)


def _store() -> Any:
    """The key-value store; only where `several`. JAX gives it no public type."""
    assert distributed.global_state.client is not None
    return distributed.global_state.client


def _index() -> int:
    return distributed.global_state.process_id


def _count() -> int:
    return distributed.global_state.num_processes or 1


def _name() -> str:
    return f"process {_index()} on {platform.node()}"
