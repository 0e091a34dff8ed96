"""Where a run happens: processes, lock, device, versions, memory."""

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

import jax
import numpy as np
from jax.experimental import multihost_utils

from mosaic_jax import errors
from mosaic_jax.stopwatch import Stopwatch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def is_primary() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Return once every process has come to `point`: what was written is there."""
    if jax.process_count() > 1:
        with Stopwatch.waits():
            multihost_utils.sync_global_devices(point)


def highest(value: int) -> int:
    """The highest `value` of all processes."""
    if jax.process_count() == 1:
        return value
    with Stopwatch.waits():
        return int(multihost_utils.process_allgather(np.array(value)).max())


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """One run at a time: the kernel drops the lock with the process.

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
                f"--workdir = {workdir}: in use by process {file.read().strip()}"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def peak_memory() -> int:
    """Bytes at most in use, on the device where it tells, else by this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Of this program alone: ru_maxrss may be that of the process that started it.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_use() -> int:
    """Bytes in use now, on the device where it tells, else by this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return peak_memory()


def free_memory() -> int | None:
    """Bytes that the first device has left; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] - stats["bytes_in_use"])


def device() -> str:
    """Kind and number of the devices in use."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def git_revision() -> str:
    """Of the checkout that this library runs from, "" outside one."""
    root = pathlib.Path(__file__).parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip()
    return ""
