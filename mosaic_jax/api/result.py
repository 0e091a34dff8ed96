"""What a finished study found: numbers, trained models, history, report."""

import functools
import html
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from mosaic_jax import report
from mosaic_jax.api import measured, parts
from mosaic_jax.api.measured import Measured
from mosaic_jax.api.model import Model
from mosaic_jax.core import errors, files, schema
from mosaic_jax.data.dataset import Info
from mosaic_jax.nn import networks
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.report import runs
from mosaic_jax.report.runs import FINAL, SavedRun
from mosaic_jax.run import store, trained
from mosaic_jax.run import study as studies
from mosaic_jax.run.store import FinishedStage
from mosaic_jax.run.summary import Summary

if TYPE_CHECKING:
    import pandas


class Result:
    """A finished study in its run directory.

    Attributes:
      workdir: the run directory.
      summary: results and costs, typed.
      settings: of the study, nested.
      models: the trained models by name, loaded when they are asked for; "final" is the
        study's result.
    """

    def __init__(self, run: SavedRun, model: Any = None) -> None:
        """The result of a run directory.

        Args:
          run: all that reports read of it.
          model: the network, where it was handed to the study as an object.
        """
        self.run = run
        self.workdir: pathlib.Path = run.path
        self.summary: Summary = run.summary
        self.settings: dict[str, Any] = run.settings
        self.models = Models(run, model)

    @functools.cached_property
    def history(self) -> "pandas.DataFrame":
        """Metrics over time: stage, loop, step, time and one column for each metric.

        Raises:
          ConfigError: pandas is not installed.
        """
        rows = [row for one in self.run.records.values() for row in one.history]
        return frame(rows, "result.history")

    @functools.cached_property
    def metrics(self) -> Measured:
        """What the study's own metrics found, see `Measured`."""
        return measured.read(self.workdir, self.summary.stages)

    @property
    def per_class(self) -> dict[str, list[float]]:
        """Test accuracy within each class, [K], of each model; NaN without images."""
        return {
            name: self.run.per_class(name).tolist() for name in self.run.predictions()
        }

    def report(self, *, interactive: bool = False) -> pathlib.Path:
        """Write report.html and figures/ into the run directory.

        Args:
          interactive: with charts to hover over and zoom in, in place of drawings.

        Returns:
          Where the page is.

        Raises:
          ConfigError: charts are asked for, and Plotly is not installed.
          DataError: files of the run are missing or damaged.
        """
        return report.write(self.workdir, interactive=interactive)

    def __repr__(self) -> str:
        found = "  ".join(
            f"{name} {value:.4f}" for name, value in self.summary.test_accuracy.items()
        )
        return f"Result({self.run.title}: {found}, workdir={str(self.workdir)!r})"

    def _repr_html_(self) -> str:
        sets = self.summary.accuracies
        models = self.summary.test_accuracy
        sets_of_final = self.metrics.models.get(FINAL, {})
        rows = [
            [name, *(_percent(sets[held_out].get(name)) for held_out in sets)]
            for name in models
        ]
        rows += [
            [name, f"{number['mean']:.4g}", *[""] * (len(sets) - 1)]
            for name, number in self.summary.headline.items()
        ]
        rows += [
            [name, *(f"{values[name]:.4g}" for values in sets_of_final.values())]
            for name in next(iter(sets_of_final.values()), {})
        ]
        head = ["", *(f"{held_out} accuracy" for held_out in sets)]
        return (
            f"<p><b>{html.escape(self.run.title)}</b></p>{table(head, rows)}"
            f"<p>{html.escape(str(self.workdir))}</p>"
        )


class Models(Mapping[str, Model]):
    """The trained models of a study by name, in the order in which they were made.

    They are named as in the summary: after the rounds "init" and "warmup", from the
    server "distilled", and "final".
    """

    def __init__(self, run: SavedRun, network: Any = None) -> None:
        """No model is loaded yet.

        Args:
          run: the finished study.
          network: as of `load`.
        """
        self._run, self._network = run, network
        self._places = trained.places(run.records)
        self._loaded: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        """The model called `name`.

        Raises:
          KeyError: there is none.
          ConfigError: its network was handed to the study, and is not given now.
          DataError: its files are damaged or from another version of the library, or
            its network has other code or fields by now.
        """
        if name not in self._places:
            raise KeyError(f"{name!r}: {schema.near(name, list(self))}")
        if name not in self._loaded:
            stage, artifact = self._places[name]
            self._loaded[name] = self._load(stage, artifact)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Models({', '.join(self)})"

    def _load(self, stage: str, artifact: str) -> Model:
        classifier, info = self._classifier
        directory = store.directory_of(
            self._run.path, stage, self._run.summary.stages[stage]
        )
        record = self._run.records[stage]
        name, code = self._run.settings["model"]["name"], studies.code_of(classifier)
        # Only a user's network may be another one by now: the library's have versions.
        if ":" in name and record.identity.get("network") != code:
            raise errors.DataError(
                f"{directory}: its network {name!r} had other code or fields"
            )
        finished = FinishedStage(stage, directory, record)
        shapes = jax.eval_shape(
            lambda: classifier.init(jax.random.key(0), info.image_shape)
        )
        try:
            found = finished.artifacts({artifact: shapes})[artifact]
        except errors.CheckpointError as error:
            raise errors.DataError(
                f"{error}: damaged, or of another version"
            ) from error
        return Model(classifier, info, found)

    @functools.cached_property
    def _classifier(self) -> tuple[Classifier, Info]:
        """The server's network, and the properties of the images that it is for."""
        told = files.read_json(self._run.path / "split.json").get("info")
        if told is None:
            raise errors.DataError(
                f"{self._run.path}: made by another version: its study must be run"
                " again for its models"
            )
        settings = self._run.settings
        info, shape = Info(**_tuples(told)), _tuples(settings["model"])
        name: str = shape["name"]
        model = schema.check(networks.Model, shape, "model")
        lowering = settings["compute"]["convolution"]
        # What is handed in goes by its name until the network is built.
        with parts.PUTTING_TOGETHER:
            if self._network is not None:
                name = parts.network(self._network)["model.name"]
            if name != shape["name"] or (self._network is None and name.endswith("()")):
                raise errors.ConfigError(
                    f"model = {None if self._network is None else name!r}: must be the"
                    f" network of {self._run.path}, which is {shape['name']!r}"
                )
            return studies.build_network(name, model, lowering, info), info


def load(workdir: str | pathlib.Path, *, model: Any = None) -> Result:
    """The result of a finished study.

    Args:
      workdir: its run directory.
      model: the network, where it was handed to the study as an object.

    Raises:
      DataError: a file is missing or damaged, or the run is of another version.
    """
    return Result(runs.read(pathlib.Path(workdir)), model)


def frame(rows: Any, what: str) -> "pandas.DataFrame":
    """Rows as a table of pandas, which is no dependency of the library.

    Args:
      rows: that `pandas.DataFrame` takes.
      what: asks for it, for messages.

    Raises:
      ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise errors.ConfigError(
            f"{what}: needs the package pandas: pip install pandas"
        ) from error
    return pandas.DataFrame(rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table for notebooks.

    Args:
      head: names of its columns.
      rows: of cells.
    """

    def line(cells: list[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _tuples(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with tuples where JSON has lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
