"""A study as Python code has it: objects in, a `Result` out."""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from mosaic_jax import configs
from mosaic_jax import server as methods
from mosaic_jax.api import measured, parts
from mosaic_jax.api import metrics as measures
from mosaic_jax.api.result import Result, load
from mosaic_jax.core import errors, files
from mosaic_jax.fl import parallel
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.run import settings as composed
from mosaic_jax.run.callbacks import Callback
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings


class Study:
    """One study: its settings, and the objects that take the place of named parts.

    Attributes:
      workdir: run directory; it is created when the study runs. The same study in the
        same directory goes on where it stopped, and reuses what is finished.
      settings: of the study, checked and typed.
    """

    def __init__(
        self,
        config: Any,
        workdir: str | pathlib.Path | None = None,
        *,
        model: Any = None,
        algorithm: Any = None,
        server: Any = None,
        data: Any = None,
        partition: Any = None,
        metrics: Any = None,
        callbacks: Sequence[Callback] = (),
        reuse_from: Sequence[str | pathlib.Path] = (),
    ) -> None:
        """Put the study together, and check all that can be checked before it runs.

        Args:
          config: name of a configuration, a ConfigDict such as `configs.get` returns,
            or nested settings as a dict; what it leaves out has the library's defaults.
          workdir: run directory; None: a new one among the temporary files.
          model: the network: a name, or any flax.linen module from images [B, H, W, D]
            to logits [B, K], which may take `train` and `mask`; one of flax.nnx as
            `nnx.bridge.to_linen(Net, ...)`.
          algorithm: of the federated rounds: a name, a class that inherits `Algorithm`,
            or an instance of one.
          server: training on the server: likewise, of `ServerTraining`. The study is
            then of method "federated".
          data: the data set: a name, what the functions of `mosaic_jax.data` return, or
            a function from a folder to `Arrays`.
          partition: how images are dealt to clients: a name, or a function
            `(labels, num_clients, rng) -> list of arrays of image numbers`, which may
            name settings of `data` such as `alpha`, and `group`, whose each image is;
            or a partitioner of flwr-datasets.
          metrics: of the trained models, on held-out images and for each client: a list
            of names of `mosaic_jax.metrics.SHIPPED`, functions of logits [N, K] and
            labels [N], and classes of `clu.metrics`; or a mapping from names to these.
          callbacks: called while the study runs, see `Callback`.
          reuse_from: other run directories, whose finished stages are taken over where
            they would be the same.

        Raises:
          ConfigError: settings or objects are wrong or contradict each other, or
            `workdir` holds another study.
          DataError: the data are missing or cannot be split.
        """
        if isinstance(config, str):
            config = configs.get(config)
        values: dict[str, Any] = {}
        with parts.PUTTING_TOGETHER:
            if model is not None:
                values |= parts.network(model)
            if algorithm is not None:
                values |= parts.component("algorithm", ALGORITHMS, algorithm)
            if server is not None:
                values |= parts.component("server", methods.METHODS, server)
                method = methods.METHODS.find(values["server.method"])
                values |= {"method": "federated", "server.when": method.when}
            if data is not None:
                values |= parts.data_set(data)
            if partition is not None:
                values |= parts.partition(partition)
            mapping = parts.changed(parts.as_mapping(config), values)
            _make_devices(mapping)
            self.settings: Settings = composed.from_mapping(mapping)
            _check_alone(self.settings)
            if workdir is None:
                workdir = tempfile.mkdtemp(prefix="mosaic_jax_")
            self.workdir = pathlib.Path(workdir)
            files.check_folder("workdir", self.workdir)
            self._experiment = Experiment(
                self.settings,
                self.workdir,
                reuse_from=reuse_from,
                callbacks=callbacks,
            )
        self._model = None if isinstance(model, str) else model
        num_classes = self._experiment.data.info.num_classes
        self._metrics = metrics and measures.measure(metrics, num_classes)

    def run(self) -> Result:
        """Run, resume or load every stage.

        In the main thread a signal such as Ctrl-C stops it at the next step; the same
        study then goes on from there.

        Raises:
          Interrupted: a signal asked to stop; the state is saved.
          DivergedError: a metric or a parameter is not finite.
        """
        summary = self._experiment.run()
        result = load(self.workdir, model=self._model)
        if self._metrics:
            data = self._experiment.data
            found = measured.measure(data, result.models, self._metrics)
            measured.write(self.workdir, summary.stages, found)
        return result

    def fingerprints(self) -> dict[str, str]:
        """Of each stage by name: a finished stage is reused as long as it is the same.

        It depends on all that the stage can see: settings, data, and the code of the
        objects that were handed in.
        """
        return {link.name: found for link, found in self._experiment.plan()}

    def __repr__(self) -> str:
        name = self.settings.data.name
        return f"Study({self.settings.method} on {name}, workdir={str(self.workdir)!r})"


def _make_devices(mapping: Mapping[str, Any]) -> None:
    """As many as the settings ask for, before anything looks which there are."""
    compute = mapping.get("compute")
    asked = compute.get("devices") if isinstance(compute, Mapping) else None
    if isinstance(asked, int):
        parallel.make_devices(asked)


def _check_alone(settings: Settings) -> None:
    """One study is one seed of one method."""
    if settings.seeds != 1:
        raise errors.ConfigError(
            f"seeds = {settings.seeds}: must be 1: make a Study of each seed"
        )
    if settings.compare:
        raise errors.ConfigError(
            f"compare = {settings.compare!r}: must be '': make a Study of each method,"
            " and `compare` their results"
        )
