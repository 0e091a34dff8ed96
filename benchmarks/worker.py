"""Functions called in another process, in the environment of a rival.

A call is a line of JSON on the worker's standard input, its answer one on the output;
arrays go over files. `python -m benchmarks.worker MODULE` is the other end: it needs
nothing but NumPy and what MODULE imports.
"""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from benchmarks import environments

Arrays = Mapping[str, np.ndarray]


class Worker:
    """Module `module` of this package, at work in environment `environment`.

    Raises:
      SystemExit: the environment is not there, or (in `call`) the worker has ended.
    """

    def __init__(self, environment: str, module: str) -> None:
        self.environment = environment
        self.folder = tempfile.TemporaryDirectory()
        interpreter = environments.python(environment)
        self.process = subprocess.Popen(
            [interpreter, "-m", "benchmarks.worker", module],
            cwd=environments.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(
        self, function: str, arrays: Arrays | None = None, **options: Any
    ) -> dict[str, np.ndarray]:
        """What `module.function(arrays, **options)` returns there: arrays by name.

        Options are numbers and strings.
        """
        call = {"function": function, "options": options, "arrays": None}
        if arrays:
            call["arrays"] = str(pathlib.Path(self.folder.name) / "arrays.npz")
            np.savez(call["arrays"], **arrays)
        # A worker that has ended gives no answer, which is told below.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.environment}: the worker ended with code {self.process.wait()};"
                " what it said is above"
            )
        path = json.loads(line)
        return _read(path) if path else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def serve(module: types.ModuleType) -> None:
    """Answer calls until the input ends."""
    # What libraries print goes to the errors, away from the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            call = json.loads(line)
            arrays = _read(call["arrays"]) if call["arrays"] else {}
            found = getattr(module, call["function"])(arrays, **call["options"])
            path = str(pathlib.Path(folder) / "arrays.npz") if found else None
            if found:
                np.savez(path, **found)
            print(json.dumps(path), file=answers, flush=True)


def _read(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]))
