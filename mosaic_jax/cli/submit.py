r"""Submit a study or a sweep to Slurm, by submitit.

mosaic submit --job timeout_min=240 --job gpus_per_node=1 \
    sweep --config digits_mosaic --grid data.alpha=0.01,0.1 --workdir runs/sweep
mosaic submit --job timeout_min=600 --job nodes=2 --job slurm_partition=gpu \
    run --config cifar10_mosaic --workdir runs/cifar10

Cells of a sweep are an array job, those that need another's stages come after it, and
at last the report. A job that is preempted or runs out of time saves its state, is
queued again and goes on where it stopped. Logs are in WORKDIR/jobs. Of several nodes
each runs one process of the study.
"""

import argparse
import ast
import contextlib
import importlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax.core import errors, files
from mosaic_jax.run import programs

LOGS = "jobs"
# How often a job whose time was up is queued again.
REQUEUES = 100


class Job:
    """A command that runs on a node; a picklable function for submitit."""

    def __init__(self, words: Sequence[str]) -> None:
        """Nothing runs yet.

        Args:
          words: of the command.
        """
        self.words = tuple(words)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the command.

        Raises:
          CalledProcessError: it ended with an error.
        """
        self._process = subprocess.Popen(self.words)
        # Not `wait`, whose lock `checkpoint` would find taken: it is called by a signal
        # handler of this very thread.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        if code:
            raise subprocess.CalledProcessError(code, self.words)

    def checkpoint(self) -> Any:
        """End the command, which saves its state, and tell what to queue again.

        submitit calls this when Slurm announces the end of the job.
        """
        if self._process is not None:
            self._process.terminate()
            while self._process.poll() is None:
                time.sleep(0.2)
        return _submitit().helpers.DelayedSubmission(Job(self.words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit the jobs.

    Args:
      arguments: of the command line; None: of this process.

    Returns:
      The exit code: 2 for a user's error.
    """
    args = parser().parse_args(arguments)
    return programs.exit_code(lambda: _submit(args.command, args.words, args.job))


def parser() -> argparse.ArgumentParser:
    """Of the command line; `words` are the flags of `command`."""
    parser = programs.parser("submit", __doc__)
    parser.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of submitit's executor: timeout_min, gpus_per_node, mem_gb,"
        "\nnodes, slurm_partition, slurm_array_parallelism, ...; repeatable",
    )
    parser.add_argument("command", choices=("run", "sweep"), help="as without submit")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its flags")
    return parser


def _submit(command: str, words: list[str], job: Sequence[str]) -> None:
    submitit = _submitit()
    parameters = dict(map(parse_parameter, job))
    workdir, waves = _of_sweep(words) if command == "sweep" else _of_run(words)
    spelt = [sys.executable, "-m", "mosaic_jax", command, *words]
    logs = workdir.absolute() / LOGS
    with _one_line("mosaic submit"):
        executor = submitit.AutoExecutor(
            folder=str(logs / "%j"), cluster="slurm", slurm_max_num_timeout=REQUEUES
        )
        executor.update_parameters(name="mosaic")
    with _one_line("--job"):
        executor.update_parameters(**parameters)
    with _one_line("mosaic submit"):
        for wave in waves:
            first, *_ = executor.submit_array([Job([*spelt, *more]) for more in wave])
            number = first.job_id.partition("_")[0]
            print(f"job {number}: {len(wave)} at a time")
            executor.update_parameters(slurm_dependency=f"afterany:{number}")
    print(f"logs in {logs}")


# Of each wave of jobs, what each adds to the command; a wave begins when the one before
# has ended.
Waves = list[list[list[str]]]


def _of_sweep(words: Sequence[str]) -> tuple[pathlib.Path, Waves]:
    """The workdir of a sweep, and its cells in waves, with the report at last."""
    from mosaic_jax.cli import launch, sweep

    args = sweep.parse_words(words)
    if args.cell is not None or args.report or args.dry_run:
        raise errors.ConfigError(
            "mosaic submit sweep: must be without --cell and --report, which its jobs"
            " have, and --dry_run, which tells of mosaic sweep"
        )
    launch.prepare()
    found = sweep.parse(args.config, args.grid, args.seeds, args.workdir, args.fixed)
    numbers = {name: str(i) for i, name in enumerate(found.cells)}
    waves: Waves = [
        [["--cell", numbers[name]] for name in wave]
        for wave in sweep.waves(found.studies())
    ]
    return args.workdir, [*waves, [["--report"]]]


def _of_run(words: Sequence[str]) -> tuple[pathlib.Path, Waves]:
    """The workdir of a study, or of a comparison, and its one job."""
    from mosaic_jax.cli import run
    from mosaic_jax.run import settings

    given = run.parse(words)
    settings.from_mapping(given.config.to_dict())
    named = given.workdir or run.default_workdir(run.config_argument(words))
    workdir = pathlib.Path(named)
    # Jobs write their logs there, and find each other's files.
    files.check_folder("--workdir", workdir)
    return workdir, [[[]]]


def parse_parameter(argument: str) -> tuple[str, Any]:
    """NAME=VALUE of --job, with a number, or another literal, as Python has it.

    Raises:
      ConfigError: it is not of that form.
    """
    name, equals, text = argument.partition("=")
    if not equals or not name:
        raise errors.ConfigError(
            f"--job = {argument!r}: must be NAME=VALUE, such as timeout_min=60"
        )
    try:
        return name, ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return name, text


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """What submitit, or sbatch, says is a user's error."""
    try:
        yield
    except Exception as error:  # both raise what they like
        told = " ".join(str(error).split())
        raise errors.ConfigError(f"{source}: {told}") from error


def _submitit() -> Any:
    """The package.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise errors.ConfigError(
            "mosaic submit: needs the package submitit: pip install submitit"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
