"""Time rivals fairly, and write down what was measured where.

Rivals take turns within one run, so that a noisy machine slows all of them alike, and
are compared by the ratio of their medians.
"""

import datetime
import fcntl
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mosaic_jax.core import files
from mosaic_jax.run import environment

RESULTS = pathlib.Path(__file__).parent / "results"


def take_turns(
    rivals: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, after one call that is not counted."""
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, result: Any) -> None:
    """Write benchmarks/results/NAME.json with date, command, hardware, versions."""
    RESULTS.mkdir(exist_ok=True)
    module = pathlib.Path(sys.argv[0]).stem
    content = {
        "command": " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]]),
        **occasion(),
        "cores": os.cpu_count(),
        "versions": environment.versions(),
        "result": result,
    }
    files.write_json(RESULTS / f"{name}.json", content)


def kept(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows that `keep` has written to a file; [] if there is none."""
    return files.read_json(path)["rows"] if path.exists() else []


def keep(path: pathlib.Path, row: dict[str, Any], *key: str) -> None:
    """Add a row to a file, in place of one that has the same values of `key`.

    Several processes may do so at a time.
    """

    def of(row: dict[str, Any]) -> list[Any]:
        return [row[name] for name in key]

    with (path.parent / f".{path.name}.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        rows = [one for one in kept(path) if of(one) != of(row)]
        files.write_json(path, {"rows": [*rows, row]})


def occasion() -> dict[str, str]:
    """When, by what code and on what something is measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": environment.git_revision(),
        "device": environment.device(),
        "processor": processor(),
    }


def processor() -> str:
    """Its name, as the system tells."""
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
