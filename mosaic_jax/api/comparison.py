"""Finished studies side by side."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mosaic_jax.api.result import Result, frame, load, table
from mosaic_jax.core import errors
from mosaic_jax.report import comparison

if TYPE_CHECKING:
    import pandas


class Comparison:
    """Finished studies side by side, by their names.

    Attributes:
      rows: what `report.comparison.summarise` finds: accuracies, bytes, FLOPs, seconds
        of each study.
    """

    def __init__(self, results: Mapping[str, Result]) -> None:
        """Read all results.

        Args:
          results: at least one, by name.
        """
        self._groups = {name: [result.run] for name, result in results.items()}
        self.rows: dict[str, dict[str, Any]] = comparison.summarise(self._groups)

    @property
    def frame(self) -> "pandas.DataFrame":
        """The table as one of pandas, with a row for each study.

        Raises:
          ConfigError: pandas is not installed.
        """
        head, cells = comparison.columns(self.rows)
        found = frame([dict(zip(head, row, strict=True)) for row in cells], "frame")
        return found.set_index(head[0])

    def report(
        self, path: str | pathlib.Path = "compare.html", *, interactive: bool = False
    ) -> pathlib.Path:
        """Write one page over all studies, and figures/ beside it.

        Args:
          path: of the page.
          interactive: with charts to hover over and zoom in, in place of drawings.

        Returns:
          Where the page is.

        Raises:
          ConfigError: charts are asked for, and Plotly is not installed.
        """
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"{len(self._groups)} studies compared"
        comparison.write(self._groups, path, title=title, interactive=interactive)
        return path

    def __repr__(self) -> str:
        return comparison.table(self.rows)

    def _repr_html_(self) -> str:
        return table(*comparison.columns(self.rows))


def compare(
    results: Iterable[Result | str | pathlib.Path]
    | Mapping[str, Result | str | pathlib.Path],
) -> Comparison:
    """Compare finished studies.

    Args:
      results: each a `Result` or a run directory; a list, whose studies are called by
        their run directories, or a mapping from names of your own.

    Raises:
      ConfigError: there are none, or it is one that is not in a list.
      DataError: one is not finished or damaged.
    """
    if isinstance(results, str | pathlib.PurePath | Result):
        raise errors.ConfigError(f"compare = {results!r}: must be a list of results")
    if isinstance(results, Mapping):
        named = dict(results.items())
    else:
        named = {_name(one): one for one in results}
    if not named:
        raise errors.ConfigError("compare = []: must have at least one result")
    found: dict[str, Result] = {
        str(name): one if isinstance(one, Result) else load(one)
        for name, one in named.items()
    }
    return Comparison(found)


def _name(one: Result | str | pathlib.Path) -> str:
    return str(one.workdir if isinstance(one, Result) else one)
