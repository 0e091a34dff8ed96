"""The environment of a run: processes, lock, device, versions, memory."""

import contextlib
import fcntl
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from mosaic_jax.core import errors, programs
from mosaic_jax.run.stopwatch import Stopwatch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_primary() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Wait until every process has come to `point`: files of others are whole then."""
    if jax.process_count() > 1:
        with Stopwatch.waits():
            multihost_utils.sync_global_devices(point)


def highest(*values: int) -> list[int]:
    """The largest of each value over all processes; all must call this."""
    if jax.process_count() == 1:
        return list(values)
    with Stopwatch.waits():
        # As bytes: devices would cut integers of 64 bits off.
        mine = np.array(values, np.int64).view(np.uint8)
        found = np.array(multihost_utils.process_allgather(mine))
        return found.view(np.int64).max(axis=0).tolist()


@contextlib.contextmanager
def locked(workdir: pathlib.Path, name: str = "") -> Iterator[None]:
    """Lock a run directory; the kernel drops the lock when the process ends.

    Args:
      workdir: run directory.
      name: that the user knows it by; "": its path.

    Raises:
      ConfigError: another process holds the lock.
    """
    if not is_primary():
        yield
        return
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise errors.ConfigError(
                f"--workdir = {name or workdir}: in use by process"
                f" {file.read().strip()}"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def peak_memory() -> int:
    """Peak memory, in bytes: of the device if it reports this, else this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would count the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use() -> int:
    """Memory in use, in bytes: of the device if it reports this, else this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_memory()


def free_memory() -> int | None:
    """Free memory of the first device in bytes; None if it does not report this.

    Of devices that are not here, it is what they have.
    """
    target = programs.target()
    if target is not None:
        return target.memory
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


def device() -> str:
    """Number and kind of the devices in use, and their backend."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def git_revision() -> str:
    """Git revision of the checkout that this library runs from; "" outside of one."""
    root = pathlib.Path(__file__).parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip()
    return ""


def progress_bar(**fields: Any) -> tqdm.tqdm:
    """A bar of tqdm with these fields: on a terminal, or as a notebook has it."""
    if "ipykernel" not in sys.modules:
        return tqdm.tqdm(**fields, disable=None)
    from tqdm import auto  # it looks for the notebook when it is imported

    return auto.tqdm(**fields)
