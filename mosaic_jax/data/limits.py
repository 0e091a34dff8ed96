"""Limits of what is read into memory: regular files that fit into it."""

import os
import pathlib
import re
import stat

from mosaic_jax.core import errors

# Data are copied once after they are read: split, resized or put on a device.
COPIES = 2
# Below this many bytes, checking takes longer than reading.
_SMALL = 1 << 24
# Files of control groups, version 2 and 1: folder, limit, usage, the cache within it.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available() -> int:
    """Bytes of memory that this process may still use.

    The least of what the machine, the control groups and the process's own limit leave.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    proc = pathlib.Path("/proc")
    if meminfo := _number(proc / "meminfo", r"MemAvailable:\s+(\d+) kB"):
        found.append(meminfo * 1024)
    if limit := _number(proc / "self" / "limits", r"Max address space\s+(\d+)"):
        used = _number(proc / "self" / "status", r"VmSize:\s+(\d+) kB") or 0
        found.append(limit - used * 1024)
    found += _left_to_groups(proc / "self" / "cgroup", pathlib.Path("/sys/fs/cgroup"))
    return max(0, min(found))


def _left_to_groups(listing: pathlib.Path, root: pathlib.Path) -> list[int]:
    """Bytes left in the control groups of this process and in their parents."""
    found = []
    for line in _text(listing).splitlines():
        _, controllers, name = line.split(":", 2)
        for controller, limit, use, cache in _GROUPS:
            if controller not in controllers.split(","):
                continue
            group = root / controller / name.lstrip("/")
            for folder in (group, *group.parents):
                most, used = _number(folder / limit), _number(folder / use)
                if most is not None and used is not None:
                    freed = _number(folder / "memory.stat", rf"\b{cache} (\d+)") or 0
                    found.append(most - used + freed)
    return found


def _number(path: pathlib.Path, pattern: str = r"^(\d+)$") -> int | None:
    match = re.search(pattern, _text(path))
    return int(match[1]) if match else None


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check(what: pathlib.Path | str, num_bytes: int) -> None:
    """Check that there is memory for `what`, whose header announces `num_bytes`.

    Raises:
      DataError: there is not.
    """
    if num_bytes <= _SMALL:
        return
    room = available()
    if COPIES * num_bytes > room:
        raise errors.DataError(
            f"{what}: claims to hold {num_bytes / 1e9:.3g} GB: must be <="
            f" {room / COPIES / 1e9:.3g} GB, half of the memory that is free"
        )


def regular(path: pathlib.Path) -> None:
    """Check that `path` is a regular file; reading a pipe or device might never end.

    Raises:
      DataError: it is something else.
      OSError: it is missing or not accessible.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise errors.DataError(f"{path}: must be a regular file")


def read(path: pathlib.Path) -> bytes:
    """The content of a regular file.

    Raises:
      DataError: it is not a regular file, or does not fit in memory.
      OSError: it is missing or not readable.
    """
    regular(path)
    check(path, path.stat().st_size)
    return path.read_bytes()
