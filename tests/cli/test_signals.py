"""Ctrl-C ends every program with one line and code 130."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from mosaic_jax.report import page
from mosaic_jax.run import runner
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "end_to_end" / "tiny_config.py")

MAIN = {
    "launch": [str(ROOT / "launch.py"), "--config", CONFIG],
    "console": ["-m", "mosaic_jax", "sweep", "--config", CONFIG],
    "run": ["-m", "mosaic_jax.cli.run", "--config", CONFIG],
    "data": ["-m", "mosaic_jax.cli.data", "digits"],
    "report": ["-m", "mosaic_jax.cli.report", "nowhere"],
    "sweep": ["-m", "mosaic_jax.cli.sweep", "--config", CONFIG],
    "list": ["-m", "mosaic_jax.cli.list"],
}
PAIRS = [(name, module) for name in MAIN for module in ("numpy", "jax", "matplotlib")]
PAIRS.remove(("list", "matplotlib"))  # it draws nothing


@pytest.mark.parametrize(("name", "module"), PAIRS)
@pytest.mark.slow
def test_ctrl_c_while_modules_are_imported(tmp_path, name, module):
    """Python, asked to, tells of each module that it has imported."""
    process = subprocess.Popen(
        [sys.executable, "-v", *MAIN[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    told = []
    with process:
        for line in process.stderr:
            told.append(line)
            if line.startswith(f"import '{module}."):
                process.send_signal(signal.SIGINT)
                break
        told += process.stderr.readlines()
    assert process.returncode == 130
    # It may come in the middle of a line of what Python tells.
    assert "".join(told).count("interrupted\n") == 1
    assert not any(line.startswith("Traceback") for line in told)
    assert not list(tmp_path.iterdir())


WRITING = """
import sys, time
from mosaic_jax import report
from mosaic_jax.core import files
from mosaic_jax.run import programs
programs.end_on_interrupt()
whole = files.write_bytes
def slowly(path, data):
    if path.suffix == ".png":
        print("drawing", flush=True)
        time.sleep(0.1)
    whole(path, data)
files.write_bytes = slowly
print(report.write(__import__("pathlib").Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_ctrl_c_while_a_report_is_written(tmp_path):
    changes = {"method": "federated", "init__rounds": 1, "warmup__rounds": 1}
    runner.Experiment(tiny.study(**changes), tmp_path).run()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "drawing\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted\n")
    assert not (tmp_path / "report.html").exists()
    page.write(tmp_path)
    assert (tmp_path / "report.html").exists()
