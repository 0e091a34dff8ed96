"""The pages of the site: those that the code makes, their order, links between them."""

import pathlib
import posixpath
import re
import tempfile
from typing import Any

from website import DOCS, ROOT, notebooks, reference, settings

# Files that a page is made of, by their path in the repository: links to them on GitHub
# are links to the page here.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "mosaic_jax/__init__.py": "reference/index.md",
    "mosaic_jax/run/settings.py": settings.PAGE,
    **{
        path.relative_to(ROOT).as_posix(): f"notebooks/{path.stem}.md"
        for path in notebooks.files()
    },
}


def generated(*, execute: bool = False) -> dict[str, str]:
    """Content of every file that the code makes, by its path among the documents.

    Args:
      execute: whether notebooks are run, for pages with their outputs.
    """
    found = {
        settings.PAGE: settings.page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        **reference.pages(),
    }
    for path in notebooks.files():
        notebook = notebooks.read(path)
        found[f"notebooks/{path.stem}.ipynb"] = notebooks.written(notebook)
        if execute:
            with tempfile.TemporaryDirectory() as folder:
                notebooks.execute(notebook, pathlib.Path(folder))
        found[PAGES[path.relative_to(ROOT).as_posix()]] = notebooks.page(path, notebook)
    return found


def expanded(nav: Any, paths: list[str]) -> Any:
    """The navigation with the pages of each folder in its place, its index first.

    Args:
      nav: as mkdocs has it; a folder ends in "/".
      paths: of all files, in the order in which pages shall stand.
    """
    if isinstance(nav, dict):
        return {name: expanded(value, paths) for name, value in nav.items()}
    if isinstance(nav, str) and nav.endswith("/"):
        pages = [path for path in paths if path.startswith(nav) and path[-3:] == ".md"]
        return sorted(pages, key=lambda path: path != f"{nav}index.md")
    if isinstance(nav, list):
        found = []
        for one in nav:
            inner = expanded(one, paths)
            found += inner if isinstance(inner, list) else [inner]
        return found
    return nav


def moved(markdown: str, here: str) -> str:
    """Links to files of the repository that have a page lead to the page.

    Args:
      markdown: of a page, whose links are those between the repository's files.
      here: the page's path within docs/.
    """
    folder = posixpath.dirname(f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if path not in PAGES:
            return match[0]
        return f"]({posixpath.relpath(f'docs/{PAGES[path]}', folder)}{match[2]})"

    return re.sub(r"\]\(([\w./]+)((?:#[\w-]+)?)\)", link, markdown)


def documents() -> list[str]:
    """Paths within docs/ of the pages that a person wrote."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
