"""Several processes that run one study: all start alike, and all fail together.

How they see each other: `peers`. How they notice that one is gone: `signs`.
"""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mosaic_jax.core import errors
from mosaic_jax.run import peers, programs
from mosaic_jax.run.peers import several
from mosaic_jax.run.signs import Signs, listed

_log = logging.getLogger(__name__)

# Seconds after which a process that still waits for others to join says so.
_PATIENCE = 4.0
# Seconds that a process whose command line is wrong waits for the others, to tell them.
_TO_TELL = 30
# Milliseconds to wait for another process; one that died is noticed earlier.
_ANSWER = 24 * 3600 * 1000
_numbers = itertools.count()
# Of the processes that were joined.
_signs: Signs | None = None

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
        if num_processes != 1 or process_id:
            raise errors.ConfigError(
                f"--coordinator = '': must be HOST:PORT for --num_processes ="
                f" {num_processes}, --process_id = {process_id}"
            )
        if _of_slurm():
            rank = int(os.environ.get("SLURM_PROCID", "0"))
            _initialize(rank, "the first task", join_seconds, silent_seconds)
        return
    if num_processes < 1:
        raise errors.ConfigError(f"--num_processes = {num_processes}: must be >= 1")
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


def _of_slurm() -> bool:
    """Whether srun has started several tasks; an allocation alone starts none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


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
    global _signs
    me = peers.name(rank)
    peers.if_killed(
        f"error: {me} ended while it waited for the others at {coordinator}, at most"
        f" {join_seconds} s (compute.join_seconds): some did not arrive, two have one"
        " --process_id, or it was stopped"
    )
    waiting = "waiting for the other processes at %s, up to %d s"
    notice = threading.Timer(_PATIENCE, _log.info, (waiting, coordinator, join_seconds))
    notice.daemon = True
    notice.start()
    # Signs of life tell earlier than JAX's own heartbeats, and while some processes are
    # done and wait for one that still draws a report.
    with _interruptible():
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
    peers.if_killed(f"error: {me} ended: {cause}; the same command resumes")
    _signs = Signs(silent_seconds, peers.count())
    _signs.start()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends this process at once in a wait where Python's handler cannot run."""
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def exchange(value: Any) -> list[Any]:
    """The `value` of every process, in their order.

    All processes must call this the same number of times.

    Args:
      value: what JSON can represent.
    """
    if not several():
        return [value]
    store, number = peers.store(), next(_numbers)
    store.key_value_set(f"mosaic_jax/{number}/{peers.index()}", json.dumps(value))
    keys = [f"mosaic_jax/{number}/{i}" for i in range(peers.count())]
    return [json.loads(store.blocking_key_value_get(key, _ANSWER)) for key in keys]


def agree(facts: Facts) -> None:
    """Check that the facts are the same in every process.

    Raises:
      ConfigError: they are not; raised in every process. Of the first group that
        differs, each fact has a line with its values and the processes.
    """
    everyone = exchange({"name": peers.name(peers.index()), "facts": facts})
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
            told = ", ".join(f"{v} in {listed(who)}" for v, who in values.items())
            lines.append(f"{fact} = {told}: must be the same in every process")
    return lines


def tell_others(
    error: errors.MosaicError, coordinator: str, num_processes: int, process_id: int
) -> None:
    """Tell of an error that came before this process has joined the others, and end.

    Where there are no others nothing is done.

    Args:
      error: the user's.
      coordinator: as of `join`.
      num_processes: likewise.
      process_id: likewise.
    """
    if not coordinator and not _of_slurm():
        return
    # Printed first: the others may never come.
    lines = programs.error_lines(error)
    print("\n".join(lines), file=sys.stderr, flush=True)
    with contextlib.suppress(errors.ConfigError):
        join(coordinator, num_processes, process_id, join_seconds=_TO_TELL)
        if several():
            peers.leave("", 2, tell=_gave_up(lines[-1]))
    peers.end(2)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """An error in this context ends the other processes as well."""
    try:
        yield
    except errors.Interrupted:  # all processes stop, after the same step
        raise
    except (Exception, SystemExit) as error:  # a user's hook may exit
        if not several():
            raise
        if lines := programs.error_lines(error):
            peers.leave("\n".join(lines), 2, tell=_gave_up(lines[-1]))
        told = traceback.format_exc()
        if _signs and _is_of_runtime(error):
            # Another process may be lost, which breaks what they compute together, and
            # those who watch for signs of life know better which.
            _signs.wait_for_lost()
        peers.leave(told, 1, tell=_gave_up(told.splitlines()[-1]))


def _is_of_runtime(error: BaseException) -> bool:
    """Whether XLA's runtime failed, of which some calls tell by a ValueError."""
    status = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(status)


def _gave_up(line: str) -> str:
    return f"{peers.name(peers.index())} gave up: {line.removeprefix('error: ')}"
