"""Time rivals fairly, and write down what was measured where.

Rivals take turns within one run, so that a noisy machine slows all of them alike, and
are compared by the ratio of their medians.
"""

import datetime
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
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]]),
        "device": environment.device(),
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": environment.versions(),
        "result": result,
    }
    files.write_json(RESULTS / f"{name}.json", content)


def processor() -> str:
    """Its name, as the system tells."""
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
