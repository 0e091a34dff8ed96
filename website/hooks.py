"""What mkdocs calls while it builds the site (mkdocs.yml names this file)."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

from website import cards, markup, pages, settings


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Generated files stand beside those of docs/; folders in the navigation expand."""
    made = pages.generated(execute=config.extra["execute"])
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    config.nav = pages.expanded(config.nav, [*pages.documents(), *made])
    return files


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """The card of a method has what the code and the benchmarks say of it."""
    here = page.file.src_uri
    markdown = pages.moved(markdown, here)
    folder, _, name = here.removesuffix(".md").rpartition("/")
    if folder != "cards":
        return markdown
    more = cards.listed() if name == "index" else cards.tail(name)
    return f"{markdown}\n\n{more}\n"


def on_page_content(
    html: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Formulas are MathML; names of settings and of documents are links."""
    here = page.file.src_uri
    links = {f"docs/{path}": path for path in pages.documents()}
    found = {name: _url(page, files, path) for name, path in links.items()}
    if here != settings.PAGE:
        place = _url(page, files, settings.PAGE)
        dotted = (name for name in settings.names() if "." in name)
        found |= {name: f"{place}#{name}" for name in dotted}
    return markup.linked(markup.formulas(html), found, without={f"docs/{here}"})


def _url(page: Page, files: Files, path: str) -> str:
    file = files.get_file_from_path(path)
    assert file, path
    return get_relative_url(file.url, page.file.url)
