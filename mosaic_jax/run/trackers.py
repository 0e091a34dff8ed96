"""Callbacks that send what a run measures to other programs, by name or as objects.

Each but TensorBoard needs the package of its program, and is set up as that program is
elsewhere: by its own environment variables.
"""

import hashlib
import importlib
import importlib.util
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorboardX

from mosaic_jax.core import errors, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.core.types import Array
from mosaic_jax.run.callbacks import Callback

# Under which these programs list the runs of this library.
PROJECT = "mosaic_jax"


class TensorBoard(Callback):
    """Events in workdir/tensorboard, written without TensorFlow."""

    def on_study_start(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        self._settings = settings
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def on_record(
        self, stage: str, loop: str, step: int, metrics: Mapping[str, float]
    ) -> None:
        del loop
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def on_pictures(self, stage: str, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(f"{stage}/{name}", picture, dataformats="HWC")

    def on_parameters(
        self, stage: str, model: str, parameters: Mapping[str, Array]
    ) -> None:
        for name, array in parameters.items():
            tag = f"{stage}/{model}/{name}"
            self._writer.add_histogram(tag, np.asarray(array))

    def on_study_end(self, results: Mapping[str, float]) -> None:
        if results:
            shown = _simple(self._settings)
            self._writer.add_hparams(shown, dict(results), name="hparams")
        self._writer.close()


class _LikeWandB(Callback):
    """A program with the interface of `wandb`, in the package `package`."""

    package = ""

    def __init__(self, **given: Any) -> None:
        """Check that the package is there.

        Args:
          given: further arguments of its `init`.

        Raises:
          ConfigError: it is not installed.
        """
        self._given = given
        self._program = _package(self.package, self.package)

    def fields(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of `init` by which a run that goes on is the same run there."""
        raise NotImplementedError

    def on_study_start(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        ours = {"project": PROJECT, "resume": "allow"} | self.fields(workdir, settings)
        self._run = self._program.init(**ours | self._given)

    def on_record(
        self, stage: str, loop: str, step: int, metrics: Mapping[str, float]
    ) -> None:
        self._run.log(_named(stage, metrics) | {f"{stage}/{loop}": step})

    def on_pictures(self, stage: str, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._run.log({f"{stage}/{name}": self._program.Image(picture)})

    def on_study_end(self, results: Mapping[str, float]) -> None:
        if results:
            self._run.log(dict(results))
        self._run.finish()


class WandB(_LikeWandB):
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    package = "wandb"

    def fields(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Runs are told apart by their identities."""
        return {
            "dir": str(workdir),
            "id": _identity(workdir),
            "name": workdir.name,
            "config": dict(settings),
            "reinit": "create_new",
        }


class MLflow(Callback):
    """A run of MLflow, where MLFLOW_TRACKING_URI says; one that goes on is the same."""

    def __init__(self) -> None:
        """Check that the package is there.

        Raises:
          ConfigError: it is not installed.
        """
        self._mlflow = _package("mlflow", "mlflow")

    def on_study_start(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> None:
        client = self._client = self._mlflow.MlflowClient()
        found = client.get_experiment_by_name(PROJECT)
        number = found.experiment_id if found else client.create_experiment(PROJECT)
        tag = f"{PROJECT}.run"
        query = f"tags.`{tag}` = '{_identity(workdir)}'"
        runs = client.search_runs([number], query, max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            client.update_run(self._run, "RUNNING")
        else:
            tags = {tag: _identity(workdir)}
            run = client.create_run(number, tags=tags, run_name=workdir.name)
            self._run = run.info.run_id
        known = client.get_run(self._run).data.params
        # A parameter is set once, and no longer than this; so many go in one message.
        new = [
            self._mlflow.entities.Param(name, str(value)[:500])
            for name, value in settings.items()
            if name not in known
        ]
        for first in range(0, len(new), 100):
            client.log_batch(self._run, params=new[first : first + 100])

    def on_record(
        self, stage: str, loop: str, step: int, metrics: Mapping[str, float]
    ) -> None:
        del loop
        for name, value in _named(stage, metrics).items():
            self._client.log_metric(self._run, name, value, step=step)

    def on_pictures(self, stage: str, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._client.log_image(self._run, picture, f"{stage}/{name}.png")

    def on_study_end(self, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            self._client.log_metric(self._run, name, value)
        self._client.set_terminated(self._run, "FINISHED" if results else "KILLED")


class Trackio(_LikeWandB):
    """A run of Trackio, on this machine unless `space_id` says otherwise."""

    package = "trackio"

    def fields(
        self, workdir: pathlib.Path, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Runs are told apart by their names."""
        return {
            "name": f"{workdir.name}-{_identity(workdir)[:8]}",
            "config": _simple(settings),
            "embed": False,
            "auto_log_cpu": False,
            "auto_log_gpu": False,
        }


def _is_tracker(found: Any) -> bool:
    """Whether `found` is a class of callbacks that needs no arguments."""
    if not (inspect.isclass(found) and issubclass(found, Callback)):
        return False
    needed = [
        one
        for one in inspect.signature(found).parameters.values()
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    return not needed


TRACKERS: Registry[type[Callback]] = Registry(
    "log.trackers",
    {
        "tensorboard": TensorBoard,
        "wandb": WandB,
        "mlflow": MLflow,
        "trackio": Trackio,
    },
    schema.Allowed(
        "a class that inherits mosaic_jax.Callback and needs no arguments", _is_tracker
    ),
)


def named(names: Sequence[str]) -> tuple[Callback, ...]:
    """The callbacks that the settings name, for one run.

    Raises:
      ConfigError: a name is unknown, a package is not installed, or a user's tracker
        cannot be made.
    """
    found = []
    for name in names:
        tracker = TRACKERS.find(name)
        try:
            found.append(tracker())
        except errors.MosaicError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise errors.ConfigError(
                f"log.trackers: {name}: {type(error).__name__}: {errors.reason(error)}"
            ) from error
    return tuple(found)


def _package(name: str, to_install: str) -> Any:
    """The package, imported.

    Raises:
      ConfigError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise errors.ConfigError(
            f"log.trackers: {name}: needs the package {name}: pip install {to_install}"
        )
    return importlib.import_module(name)


def _identity(workdir: pathlib.Path) -> str:
    """What a run directory is called where names must be unique, 16 hex digits."""
    return hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]


def _named(stage: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics by their names in a whole study."""
    return {f"{stage}/{name}": value for name, value in metrics.items()}


def _simple(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose values are numbers and texts."""
    simple = (bool, int, float, str)
    return {
        name: value if isinstance(value, simple) else str(value)
        for name, value in settings.items()
    }
