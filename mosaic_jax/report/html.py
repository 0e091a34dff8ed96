"""Building blocks of pages, as Jinja has them in templates/.

Every argument is plain text, and is escaped, unless it is Markup.
"""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from mosaic_jax.core import files
from mosaic_jax.report import charts, figures, glossary, numbers

_HERE = pathlib.Path(__file__).parent
# Columns with a cell longer than this are prose: they wrap.
_PROSE = 40


def _anchor(name: str) -> str:
    return "-".join(name.lower().split())


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {"anchor": _anchor, "meaning": glossary.meaning}
_BLOCKS: Any = _TEMPLATES.get_template("blocks.html").module


def page(
    title: str, lead: str, sections: Mapping[str, Markup], headline: str = ""
) -> str:
    """A whole page.

    Args:
      title: its heading.
      lead: a line below that.
      sections: by their headings; empty ones are left out.
      headline: what was found, in a sentence; "": nothing is said.
    """
    shown = {name: body for name, body in sections.items() if body}
    scripts = []
    # By elements: text, which is escaped, cannot have them.
    if any("<figure" in body for body in shown.values()):
        scripts.append(_own("download.js"))
    if any('<div class="chart"' in body for body in shown.values()):
        scripts += [charts.library(), _own("charts.js")]
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        lead=lead,
        headline=headline,
        sections=shown,
        style=_own("style.css"),
        scripts=scripts,
    )


def _own(name: str) -> Markup:
    """A file of this folder, as it is."""
    return Markup((_HERE / name).read_text())


def joined(parts: Sequence[Markup]) -> Markup:
    """One after the other."""
    return Markup("").join(parts)


def paragraph(text: str) -> Markup:
    """Of running text."""
    return _BLOCKS.paragraph(text)


def cards(values: Mapping[str, str]) -> Markup:
    """Headline numbers by name."""
    return _BLOCKS.cards(values)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> Markup:
    """A table that scrolls within the page.

    Args:
      head: of each column.
      rows: cells; the first names its row.
      caption: what it shows, for those who hear the page.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = enumerate(zip(*cells, strict=True))
    prose = [i for i, column in columns if max(map(len, column)) > _PROSE]
    return _BLOCKS.table(head, cells, caption, prose)


def searchable(head: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> Markup:
    """A table of many clients: a field to search in them and the first of those found.

    A page can hold one.

    Args:
      head: of each column.
      rows: cells; the first names its row.
      name: what is searched.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    return _BLOCKS.searchable(head, cells, name, _own("search.js"))


def terms(meanings: Mapping[str, str]) -> Markup:
    """A list of terms with what they mean."""
    return _BLOCKS.terms(meanings)


def figure(
    name: str, drawn: Figure, caption: str, *, interactive: bool = False
) -> Markup:
    """A figure that follows the page's theme, with its numbers to take along.

    Args:
      name: of the files that it is saved as.
      drawn: the figure.
      caption: a sentence below it.
      interactive: on a screen, a chart takes its place.
    """
    chart = charts.chart(drawn) if interactive else None
    table = base64.b64encode(numbers.of(drawn).encode()).decode()
    return _BLOCKS.figure(name, figures.svg(drawn, caption), caption, table, chart)


class FigureFolder:
    """Figures that go into the page and, as PNG, into a folder."""

    def __init__(self, path: pathlib.Path, *, interactive: bool = False) -> None:
        """Make the folder where it is missing.

        Args:
          path: where it is.
          interactive: the page has charts of Plotly in place of the figures.

        Raises:
          ConfigError: they cannot be drawn, as Plotly is not installed.
        """
        if interactive:
            charts.library()
        path.mkdir(parents=True, exist_ok=True)
        self._path, self._interactive = path, interactive

    def save(self, name: str, drawn: Figure) -> None:
        """Write it as `name`.png.

        Raises:
          CheckpointError: the name, which a file may have told, leads elsewhere.
        """
        figures.save(drawn, files.child(self._path, f"{name}.png"))

    def add(self, name: str, drawn: Figure, caption: str) -> Markup:
        """Write a figure, and show it.

        Args:
          name: of the file.
          drawn: the figure.
          caption: a sentence below it.
        """
        self.save(name, drawn)
        return figure(name, drawn, caption, interactive=self._interactive)


def side_by_side(*parts: Markup, small: bool = False) -> Markup:
    """Figures, two beside each other where there is room, small ones more."""
    return _BLOCKS.side_by_side(parts, small) if any(parts) else Markup()


def image(pixels: np.ndarray, label: str) -> Markup:
    """uint8 [H, W, D] with D of 1 or 3 as an inline picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        buffer, format="png", optimize=True
    )
    png = base64.b64encode(buffer.getvalue()).decode()
    return _BLOCKS.image(png, label, pixels.shape[1] > pixels.shape[0])


def strips(
    head: Sequence[str], rows: Sequence[tuple[str, Sequence[Markup]]], caption: str
) -> Markup:
    """A table of pictures.

    Args:
      head: of each column, that of the names included.
      rows: name and cells of each.
      caption: what it shows, for those who hear the page.
    """
    return _BLOCKS.strips(head, [(name, *cells) for name, cells in rows], caption)


def pairs(rows: Sequence[tuple[str, Mapping[str, Markup]]]) -> Markup:
    """Pictures one below the other, at a size at which one sees them.

    Args:
      rows: name and pictures, by their headings, of each.
    """
    return _BLOCKS.pairs(rows)


def folded(name: str, body: Markup) -> Markup:
    """What stands behind a line that opens it."""
    return _BLOCKS.folded(name, body)


def listing(text: str) -> Markup:
    """Preformatted."""
    return _BLOCKS.listing(text)


def links(targets: Mapping[str, str]) -> Markup:
    """Names with the relative addresses of their pages."""
    return _BLOCKS.links(targets)
