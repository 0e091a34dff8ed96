"""The notebooks, which are Python files with cells, as pages and as notebooks."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jupytext

from website import ROOT

FOLDER = ROOT / "examples" / "notebooks"
# Seconds that one cell may take.
LONGEST = 900


def files() -> list[pathlib.Path]:
    """The notebooks in the order of their names."""
    return sorted(FOLDER.glob("*.py"))


def read(path: pathlib.Path) -> Any:
    """The notebook, of nbformat."""
    return jupytext.read(path, fmt="py:percent")


def written(notebook: Any) -> str:
    """The notebook as the file that Jupyter reads."""
    return jupytext.writes(notebook, fmt="ipynb")


def execute(notebook: Any, folder: pathlib.Path) -> None:
    """Run all cells, in place, in a kernel that starts in `folder`.

    It imports this clone's library, wherever another one is installed.

    Args:
      notebook: whose cells get their outputs.
      folder: where run directories come to lie.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raises.
    """
    import nbclient  # here, as pages are made without it

    where = {"metadata": {"path": str(folder)}}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    client = nbclient.NotebookClient(notebook, timeout=LONGEST, resources=where)
    client.execute(env=environment)


def page(path: pathlib.Path, notebook: Any) -> str:
    """Markdown of a notebook, with the outputs that it has."""
    title, *parts = [part for cell in notebook.cells for part in _parts(cell)]
    where = (
        f"*This page is a notebook: [download it]({path.stem}.ipynb), or open"
        f" `{path.relative_to(ROOT)}` in Jupyter with jupytext.*"
    )
    first, _, rest = title.partition("\n")
    return "\n\n".join([first, where, rest, *parts]) + "\n"


def _parts(cell: Any) -> Iterator[str]:
    if cell.cell_type == "markdown":
        yield cell.source
        return
    yield f"```python\n{cell.source}\n```"
    for output in cell.get("outputs", ()):
        shown = _shown(output)
        if shown:
            yield f'<div class="output">\n{shown}\n</div>'


def _shown(output: Any) -> str:
    """HTML of what a cell gave; "" of progress bars and warnings."""
    if output.output_type == "stream":
        return _text(output.text) if output.name == "stdout" else ""
    data = output.data
    if "image/png" in data:
        picture = data["image/png"].strip()
        return f'<img alt="Figure" src="data:image/png;base64,{picture}">'
    if "text/html" in data:
        return "".join(data["text/html"].splitlines())
    return _text(data["text/plain"])


def _text(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").rstrip()
    return f"<pre>{escaped}</pre>"
