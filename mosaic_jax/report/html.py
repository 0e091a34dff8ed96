"""Building blocks of pages. Every argument is plain text unless it says HTML."""

import base64
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mosaic_jax.core import files
from mosaic_jax.report import figures, glossary, numbers

_HERE = pathlib.Path(__file__).parent
# Columns with a cell longer than this are prose: they wrap.
_PROSE = 40
_PROSE_CLASS = {True: ' class="prose"', False: ""}
# A page needs nothing from outside and runs nothing but its own script.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'"
)


def page(
    title: str, lead: str, sections: Sequence[tuple[str, str]], headline: str = ""
) -> str:
    """A whole page.

    Args:
      title: its heading.
      lead: a line below that.
      sections: heading and HTML of each; empty ones are left out.
      headline: what was found, in a sentence; "": nothing is said.
    """
    told = f'<p class="headline">{html.escape(headline)}</p>' if headline else ""
    shown = [(name, body) for name, body in sections if body]
    links = "".join(
        f'<li><a href="#{_anchor(name)}">{html.escape(name)}</a></li>'
        for name, _ in shown
    )
    parts = "".join(
        f'<section aria-labelledby="{_anchor(name)}"><h2 id="{_anchor(name)}">'
        f"{html.escape(name)}</h2>{body}</section>"
        for name, body in shown
    )
    style = (_HERE / "style.css").read_text()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{style}</style></head><body>
<header><h1>{html.escape(title)}</h1>{told}
<p class="quiet">{html.escape(lead)}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>{parts}</main>
{_script("download.js") if "data-get" in parts else ""}
</body></html>
"""


def _script(name: str) -> str:
    return f"<script>{(_HERE / name).read_text()}</script>"


def _anchor(name: str) -> str:
    return "-".join(name.lower().split())


def paragraph(text: str) -> str:
    """`text` as HTML."""
    return f"<p>{html.escape(text)}</p>"


def cards(values: Mapping[str, str]) -> str:
    """Headline numbers by name."""
    items = "".join(
        f"<li><strong>{html.escape(value)}</strong><span>{html.escape(name)}</span></li>"
        for name, value in values.items()
    )
    return f'<ul class="cards">{items}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A table that scrolls within the page.

    Args:
      head: of each column.
      rows: cells; the first names its row.
      caption: what it shows, for those who hear the page.
    """
    columns = zip(*rows, strict=True)
    prose = [max(len(str(cell)) for cell in cells) > _PROSE for cells in columns]
    body = "".join(_row(row, prose) for row in rows)
    return _table(head, body, caption, prose=prose)


def _row(cells: Sequence[Any], prose: Sequence[bool]) -> str:
    first, *rest = map(str, cells)
    return (
        f'<tr><th scope="row">{term(first)}</th>'
        + "".join(
            f"<td{_PROSE_CLASS[wraps]}>{html.escape(cell)}</td>"
            for cell, wraps in zip(rest, prose[1:], strict=True)
        )
        + "</tr>"
    )


def _table(
    head: Sequence[str],
    rows: str,
    caption: str,
    *,
    body_id: str = "",
    prose: Sequence[bool] = (),
) -> str:
    wraps = [*prose, *[False] * (len(head) - len(prose))]
    heads = "".join(
        f'<th scope="col"{_PROSE_CLASS[wrap]}>{term(name)}</th>'
        for name, wrap in zip(head, wraps, strict=True)
    )
    label = html.escape(caption)
    mark = f' id="{body_id}"' if body_id else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody{mark}>{rows}</tbody></table></div>"
    )


def searchable(head: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> str:
    """A table of many clients: a field to search in them and the first of those found.

    A page can hold one.

    Args:
      head: of each column.
      rows: cells; the first names its row.
      name: what is searched.
    """
    data = json.dumps([[str(cell) for cell in row] for row in rows])
    # Within a script element only "</" and "<!--" end or change anything.
    data = data.replace("<", "\\u003c")
    return (
        f'<div class="search"><label for="clients-search">Search {html.escape(name)}'
        '</label><input id="clients-search" type="search" autocomplete="off"></div>'
        '<p id="clients-told" role="status"></p>'
        + _table(head, "", name, body_id="clients-rows")
        + f'<script type="application/json" id="clients-data">{data}</script>'
        + _script("search.js")
    )


def term(text: str) -> str:
    """`text`, with what it means on hover where the glossary has it."""
    meaning = glossary.meaning(text)
    shown = html.escape(text)
    return f'<abbr title="{html.escape(meaning)}">{shown}</abbr>' if meaning else shown


def terms(meanings: Mapping[str, str]) -> str:
    """A list of terms with what they mean."""
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>"
        for name, meaning in meanings.items()
    )
    return f"<dl>{items}</dl>"


def figure(name: str, drawn: Figure, caption: str) -> str:
    """A figure that follows the page's theme, with its numbers to take along.

    Args:
      name: of the files that it is saved as.
      drawn: the figure.
      caption: a sentence below it.
    """
    text = html.escape(caption)
    table = base64.b64encode(numbers.of(drawn).encode()).decode()
    file = html.escape(name)
    return (
        f'<figure data-name="{file}">{figures.svg(drawn, text)}<figcaption>{text}'
        ' <span class="get"><button type="button" data-get="svg">SVG</button>'
        '<button type="button" data-get="png">PNG</button>'
        f'<a download="{file}.csv" href="data:text/csv;base64,{table}">CSV</a></span>'
        "</figcaption></figure>"
    )


class FigureFolder:
    """Figures that go into the page and, as PNG, into a folder."""

    def __init__(self, path: pathlib.Path) -> None:
        """Make the folder at `path` where it is missing."""
        path.mkdir(parents=True, exist_ok=True)
        self._path = path

    def save(self, name: str, drawn: Figure) -> None:
        """Write it as `name`.png.

        Raises:
          CheckpointError: the name, which a file may have told, leads elsewhere.
        """
        figures.save(drawn, files.child(self._path, f"{name}.png"))

    def add(self, name: str, drawn: Figure, caption: str) -> str:
        """Write a figure, and show it.

        Args:
          name: of the file.
          drawn: the figure.
          caption: a sentence below it.

        Returns:
          HTML.
        """
        self.save(name, drawn)
        return figure(name, drawn, caption)


def side_by_side(*parts: str, small: bool = False) -> str:
    """Figures in HTML, two beside each other where there is room, small ones more."""
    kind = "figures small" if small else "figures"
    return f'<div class="{kind}">{"".join(parts)}</div>' if any(parts) else ""


def image(pixels: np.ndarray, label: str) -> str:
    """uint8 [H, W, D] with D of 1 or 3 as an inline picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        buffer, format="png", optimize=True
    )
    encoded = base64.b64encode(buffer.getvalue()).decode()
    mark = ' class="strip"' if pixels.shape[1] > pixels.shape[0] else ""
    return (
        f'<img{mark} alt="{html.escape(label)}" src="data:image/png;base64,{encoded}">'
    )


def strips(
    head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str
) -> str:
    """A table of pictures.

    Args:
      head: of each column, that of the names included.
      rows: name and cells, in HTML, of each.
      caption: what it shows, for those who hear the page.
    """
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="film">{_table(head, body, caption)}</div>'


def pairs(rows: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Pictures one below the other, at a size at which one sees them.

    Args:
      rows: name and pictures, in HTML, by their headings, of each.
    """
    items = "".join(
        f"<li><strong>{html.escape(name)}</strong>"
        + "".join(
            f"<div><span>{html.escape(head)}</span>{cell}</div>"
            for head, cell in cells.items()
        )
        + "</li>"
        for name, cells in rows
    )
    return f'<ul class="pairs">{items}</ul>'


def folded(name: str, body: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details><summary>{html.escape(name)}</summary>{body}</details>"


def listing(text: str) -> str:
    """Preformatted."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def links(targets: Mapping[str, str]) -> str:
    """Names with the relative addresses of their pages."""
    items = "".join(
        f'<li><a href="{html.escape(address)}">{html.escape(name)}</a></li>'
        for name, address in targets.items()
    )
    return f"<ul>{items}</ul>"
