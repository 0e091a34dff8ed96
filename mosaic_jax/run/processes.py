"""Several processes that run one study: all start alike, and all fail together.

They communicate by the key-value store of `jax.distributed`. It needs no device, and it
works while another process is stuck in a computation that will never end.
"""

import atexit
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import platform
import socket
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
from mosaic_jax.run.last_words import LastWords

_log = logging.getLogger(__name__)

# Seconds between two checks whether another process has given up.
LOOK_EVERY = 0.5
# Seconds after which a process that still waits for others to join says so.
_PATIENCE = 4.0
# Seconds that the coordinator, which keeps the store, waits for the others to end.
LAST_TO_LEAVE = 10.0
# Seconds that a process whose command line is wrong waits for the others, to tell them.
_TO_TELL = 30
# Milliseconds to wait for another process; one that died is noticed earlier.
_ANSWER = 24 * 3600 * 1000
_numbers = itertools.count()
# Held by the one thread that ends this process.
_leaving = threading.Lock()
# What is printed if it is killed; there once it joins others.
_last_words: LastWords | None = None
# Seconds after which a process that sends no sign of life counts as lost.
_silent_seconds = 20.0

# Facts by name, in groups such as "settings".
Facts = Mapping[str, Mapping[str, Any]]


def join(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    join_seconds: int = 300,
    silent_seconds: float = 20.0,
) -> None:
    """Join the other processes of this study; must be called before using any device.

    Without a coordinator, SLURM's environment names the processes; outside of SLURM
    this process is the only one. From now on this process ends soon after another one
    has given up or has not been heard of.

    Args:
      coordinator: "HOST:PORT" of process 0, or "".
      num_processes: number of processes.
      process_id: number of this process, in [0, num_processes - 1].
      join_seconds: to wait for the others, at most.
      silent_seconds: after which a process that sends no sign of life counts as lost.

    Raises:
      ConfigError: the arguments contradict each other, or there is no coordinator.
    """
    if not coordinator:
        if num_processes != 1:
            raise errors.ConfigError(
                f"--coordinator = '': must be HOST:PORT for --num_processes ="
                f" {num_processes}"
            )
        # Set by srun for its tasks; an allocation alone starts no other process.
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            rank = int(os.environ.get("SLURM_PROCID", "0"))
            _initialize(rank, "the first task", join_seconds, silent_seconds)
        return
    if not 0 <= process_id < num_processes:
        raise errors.ConfigError(
            f"--process_id = {process_id}: must be in [0, {num_processes - 1}] for"
            f" --num_processes = {num_processes}"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise errors.ConfigError(
            f"--coordinator = {coordinator!r}: must be HOST:PORT, with a port from 1 to"
            " 65535"
        )
    if process_id == 0:
        _check_free(coordinator, int(port))
    else:
        _reach(coordinator, host, int(port), join_seconds)
    _initialize(
        process_id,
        coordinator,
        join_seconds,
        silent_seconds,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
    )


def _check_free(coordinator: str, port: int) -> None:
    """Check that no other process 0 is there: JAX would end both without a word.

    Raises:
      ConfigError: the port is in use.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        # Anything else, such as a machine without IPv6, JAX may cope with.
        if error.errno == errno.EADDRINUSE:
            why = os.strerror(errno.EADDRINUSE)
            raise errors.ConfigError(
                f"--coordinator = {coordinator}: {why}: is another process number 0?"
                " Each must have a --process_id of its own"
            ) from error


def _reach(coordinator: str, host: str, port: int, seconds: int) -> None:
    """Wait until something listens at the coordinator's address.

    Raises:
      ConfigError: nothing does, for so many seconds.
    """
    begin, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return
        except UnicodeError as error:
            raise errors.ConfigError(
                f"--coordinator = {coordinator}: no name of a host"
            ) from error
        except OSError as error:
            waited = time.monotonic() - begin
            if waited > seconds:
                raise errors.ConfigError(
                    f"--coordinator = {coordinator}: no process 0 after {seconds} s"
                    f" (compute.join_seconds): {error.strerror or error}"
                ) from error
            if waited > _PATIENCE and not told:
                told = True
                _log.info(
                    "waiting for process 0 at %s, up to %d s", coordinator, seconds
                )
        time.sleep(0.2)


def _initialize(
    rank: int, coordinator: str, join_seconds: int, silent_seconds: float, **named: Any
) -> None:
    global _last_words
    me = f"process {rank} on {platform.node()}"
    _last_words = LastWords(
        f"error: {me} could not join the others at {coordinator} within {join_seconds}"
        " s (compute.join_seconds): some did not arrive, or two have one --process_id"
    )
    notice = threading.Timer(
        _PATIENCE,
        lambda: _log.info(
            "waiting for the other processes at %s, up to %d s",
            *(coordinator, join_seconds),
        ),
    )
    notice.daemon = True
    notice.start()
    # Signs of life tell earlier than JAX's own heartbeats, and while some processes are
    # done and wait for one that still draws a report.
    jax.distributed.initialize(
        initialization_timeout=join_seconds,
        heartbeat_timeout_seconds=max(100, math.ceil(2 * silent_seconds)),
        shutdown_timeout_seconds=24 * 3600,
        **named,
    )
    notice.cancel()
    cause = "it was killed, out of memory perhaps"
    if rank:
        cause += f", or process 0 at {coordinator} is gone, which keeps them together"
    _last_words.change(f"error: {me} ended: {cause}; the same command resumes")
    _watch(silent_seconds)


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


def tell_others(
    error: errors.MosaicError, coordinator: str, num_processes: int, process_id: int
) -> NoReturn:
    """Print an error that came before this process has joined the others; end all.

    Args:
      error: the user's.
      coordinator: as of `join`.
      num_processes: likewise.
      process_id: likewise.
    """
    lines = programs.error_lines(error)
    print("\n".join(lines), file=sys.stderr, flush=True)
    with contextlib.suppress(errors.ConfigError):
        join(coordinator, num_processes, process_id, join_seconds=_TO_TELL)
        if several():
            with _leaving:
                _leave(2, f"{_name()} gave up: {lines[-1].removeprefix('error: ')}")
    _end(2)


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
        told = traceback.format_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Another process may be lost, which breaks what they compute together. The
            # thread that watches them knows better which, and ends this one.
            time.sleep(_silent_seconds + 5 * LOOK_EVERY)
        _give_up(told, 1)


def _give_up(message: str, code: int) -> NoReturn:
    """Print `message`, tell the other processes, and end this one."""
    with _leaving:
        print(message, file=sys.stderr, flush=True)
        lines = message.splitlines() or [""]
        reason = f"{_name()} gave up: {lines[-1].removeprefix('error: ')}"
        _leave(code, reason)


def _watch(silent_seconds: float) -> None:
    """End this process soon after another one gave up or fell silent."""
    global _silent_seconds
    _silent_seconds = silent_seconds
    signs = _Signs(silent_seconds)
    # Runs before JAX's own, after which the store is gone.
    atexit.register(signs.end)
    for run in (signs.exchange, signs.check_coordinator):
        threading.Thread(target=run, daemon=True).start()


class _Signs:
    """Signs of life of all processes, as this one sees them."""

    def __init__(self, silent_seconds: float) -> None:
        self._silent_seconds = silent_seconds
        # When the store last answered; None: the study is over.
        self._answered: float | None = time.monotonic()
        # When signs were last looked at, and whether this process is about to end.
        self._looked, self._ending = time.monotonic(), False
        # Of each process the last sign, and when it was new.
        self._heard: dict[str, tuple[str, float]] = {}

    def end(self) -> None:
        """From now on the store may go at any time, as the study is over."""
        self._ending = True

    def exchange(self) -> None:
        """Send signs of life, and end this process if another one sends none."""
        store = _store()
        for beat in itertools.count():
            time.sleep(LOOK_EVERY)
            sign = json.dumps([_name(), beat])
            try:
                store.key_value_set(
                    f"mosaic_jax/alive/{_index()}", sign, allow_overwrite=True
                )
                reasons = store.key_value_dir_get("mosaic_jax/gave_up/")
                signs = dict(store.key_value_dir_get("mosaic_jax/alive/"))
            except Exception:
                if self._ending:
                    self._answered = None
                    return
                continue  # `check_coordinator` says how long this may go on
            self._answered = time.monotonic()
            if reasons:
                _follow(reasons[0][1])
            if lost := self._lost(signs):
                have = "has" if len(lost) == 1 else "have"
                reason = f"{_listed(lost)} {have} sent no sign of life for"
                reason += f" {self._silent_seconds:g} s (compute.silent_seconds):"
                reason += " killed, stopped or cut off; the same command resumes"
                _follow(reason, tell=reason, lost=len(lost))

    def _lost(self, signs: Mapping[str, str]) -> list[str]:
        """Names of the processes whose last sign is too old."""
        now, before = time.monotonic(), self._looked
        self._looked = now
        # After a stop of this process the others, stopped too perhaps, get their time.
        stopped = now - before > self._silent_seconds / 2
        for key, sign in signs.items():
            if stopped or self._heard.get(key, ("", now))[0] != sign:
                self._heard[key] = sign, now
        return [
            json.loads(sign)[0]
            for sign, since in self._heard.values()
            if now - since > self._silent_seconds
        ]

    def check_coordinator(self) -> None:
        """End this process if the store, which process 0 keeps, does not answer."""
        looked = time.monotonic()
        while self._answered is not None:
            time.sleep(LOOK_EVERY)
            now, before, answered = time.monotonic(), looked, self._answered
            looked = now
            if now - before > self._silent_seconds / 2:
                # It is this process that was stopped: the others may well be there.
                self._answered = answered and now
            elif answered and now - answered > self._silent_seconds:
                reason = "process 0, which keeps the processes together, has not"
                reason += f" answered for {self._silent_seconds:g} s"
                reason += " (compute.silent_seconds); the same command resumes"
                with _leaving:
                    print(f"error: {reason}", file=sys.stderr, flush=True)
                    _end(2)


def _follow(reason: str, *, tell: str = "", lost: int = 0) -> NoReturn:
    """End this process as `lost` others have ended, telling the others `tell`."""
    with _leaving:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        _leave(2, tell, lost)


def _leave(code: int, reason: str, lost: int = 0) -> NoReturn:
    """End this process, telling the others the `reason` unless it is "".

    The coordinator waits a little for the others, but not for the `lost` ones.

    Nothing is cleaned up, as that would wait for the others. Files are whole.
    """
    store = _store()
    try:
        if reason:
            store.key_value_set(f"mosaic_jax/gave_up/{_index()}", reason)
        store.key_value_set(f"mosaic_jax/left/{_index()}", "")
        if _index() == 0:
            rest = _count() - lost
            _wait(lambda: len(store.key_value_dir_get("mosaic_jax/left/")) >= rest)
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End this process at once."""
    if _last_words:
        _last_words.drop()
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
