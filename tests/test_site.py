"""The documentation site: every page is in its order, every method has its card."""

import ast
import dataclasses
import functools
import http.server
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import types

import pytest
import yaml
from playwright import sync_api

import mosaic_jax
from mosaic_jax import stages
from mosaic_jax.cli import run as program
from mosaic_jax.core.registry import group_of
from tests import tiny
from website import DOCS, ROOT, cards, notebooks, pages, reference, settings, tables

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HOW_TO = [DOCS / "howto" / f"{name}.md" for name in ("network", "method", "data")]
NOTEBOOKS = notebooks.files()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def made():
    return pages.generated()


@pytest.fixture
def config():
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


class _Loader(yaml.SafeLoader):
    """Takes what mkdocs reads from the environment for its default."""


_Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[1])


# --- pages and links


def listed(nav):
    """Every page of a navigation."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for one in values for page in listed(one)]


def test_the_navigation_has_every_page_once(config):
    paths = [*pages.documents(), *made()]
    found = listed(pages.expanded(config["nav"], paths))
    assert sorted(found) == sorted(path for path in paths if path.endswith(".md"))
    cards_of = [page for page in found if page.startswith("cards/")]
    assert cards_of[0] == "cards/index.md"


def test_links_to_files_with_a_page_lead_to_the_page():
    text = "[a](../CHANGELOG.md), [b](studies.md#data), [c](https://x.org/CHANGELOG.md)"
    changed = "[a](changelog.md), [b](studies.md#data), [c](https://x.org/CHANGELOG.md)"
    assert pages.moved(text, "index.md") == changed
    text = "[a](../../mosaic_jax/run/settings.py#seed)"
    assert pages.moved(text, "howto/x.md") == "[a](../reference/settings.md#seed)"


def slug(heading):
    """The anchor of a heading."""
    kept = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"\s+", "-", kept)


def links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), path
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), (path, anchor)


def kind_of(line):
    """What kind of block a line of Markdown begins or goes on."""
    for kind, pattern in (("bullet", r"[-*+] "), ("number", r"\d+\. "), ("row", r"\|")):
        if re.match(pattern, line):
            return kind
    return "more" if line.startswith(" ") or not line else "text"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_the_site_reads_lists_as_github_does(page):
    """Which it does not where a list follows something else at once."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    before, last = "text", ""
    for line in text.splitlines():
        kind = kind_of(line)
        if kind in ("bullet", "number"):
            other = {"bullet": "number", "number": "bullet"}[kind]
            assert before != other, f"{line}: must not follow a list of another kind"
            assert before == kind or not last, f"{line}: must follow an empty line"
        assert not re.match(r" {1,3}(```|[-*+] )", line), f"{line}: indent by four"
        before, last = before if kind == "more" else kind, line


def test_the_quick_start_is_the_readme_s():
    readme = (ROOT / "README.md").read_text().splitlines()
    blocks = re.findall(r"```\w*\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        assert line in readme


def test_the_diagram_has_the_stages_and_what_they_keep():
    drawing = (DOCS / "concepts.svg").read_text()
    rows = re.findall(r'class="(stage|artifact)"[^>]*>(\w+)</text>', drawing)
    names = [name for kind, name in rows if kind == "stage"]
    kept = [name for kind, name in rows if kind == "artifact"]
    study = tiny.study(warmup__rounds=1, finetune__rounds=1, audit__images=0)
    chain = stages.chain(study)
    assert names == [link.name for link in chain]
    for link, artifact in zip(chain, kept, strict=True):
        assert artifact in link.stage.provides(study)


# --- method cards


@pytest.mark.parametrize("name", cards.names())
def test_a_method_has_a_card(name):
    assert cards.title(name)
    assert re.search(r"\b(19|20)\d\d\b", cards.source(name))
    assert "](https://" in cards.source(name)
    assert cards.formulas(name)
    found = program.parse(cards.command(name).split()[2:]).config.to_dict()
    assert found["method"] == ("mosaic" if name == "mosaic" else "federated")
    group, _, last = cards.field(name).rpartition(".")
    assert (found[group][last] if group else found[last]) == name


def test_a_card_is_of_a_method():
    written = {path.stem for path in cards.FOLDER.glob("*.md")}
    assert written == {*cards.names(), "index"}
    assert len({cards.title(name) for name in cards.names()}) == len(cards.names())


@pytest.mark.parametrize("path", sorted(cards.FOLDER.glob("*.md")), ids=name_of)
def test_formulas_are_known(path):
    markup = pytest.importorskip("website.markup", exc_type=ImportError)
    text = path.read_text()
    inline = re.findall(r"(?<!\$)\$([^$]+)\$(?!\$)", text)
    for formula in [*cards.formulas(path.stem), *inline]:
        assert markup.mathml(formula).startswith("<math")
        # Either could begin a list, or a row of a table.
        assert not re.search(r"^[-+*|] ", formula, re.MULTILINE), formula
    with pytest.raises(ValueError, match=r"unknown command \\nosuch"):
        markup.mathml(r"\nosuch x")


@pytest.mark.parametrize(
    ("heading", "topic", "expected"),
    [
        ("Federated averaging family", "FedPer and FedRep, what", {"fedper", "fedrep"}),
        ("Federated averaging family", "FedAvgM, FedAdam, eta", {"fedavgm", "fedadam"}),
        ("Prototypes in place of models", "class means", {"fedproto", "fedtgp"}),
        ("Prototypes in place of models", "FedTGP, rate", {"fedtgp"}),
        ("Mosaic", "network", {"mosaic"}),
        ("Comparing", "network", set()),
    ],
)
def test_which_methods_a_row_is_about(heading, topic, expected):
    assert cards.about(heading, topic) == expected


def test_every_row_of_the_methods_is_on_a_card():
    rows = [
        (heading, row[0])
        for heading, head, found in tables.read((DOCS / "methods.md").read_text())
        if head[0] == "topic"
        for row in found
    ]
    assert len(rows) > 60
    assert [row for row in rows if not cards.about(*row)] == []


def test_a_card_has_fields_differences_and_what_was_measured():
    told = cards.tail("fedprox")
    assert "| `methods.fedprox.mu` | `0.01` | >= 0 |" in told
    assert "| FedProx, mu 0.01 |" in told and "FedBN" not in told
    assert re.search(r"\| fedprox_decay \| 0, 1, 2 \| \d\d\.\d ± ", told)
    assert "Not with today's settings" in cards.tail("scaffold")
    assert "experts of their classes" in cards.tail("mosaic")


def test_a_card_has_every_field():
    for name in cards.names():
        if of := cards.component(name):
            own = settings.of_component(group_of(name, of))
            declared = {one.name for one in dataclasses.fields(of) if one.init}
            assert {found.rpartition(".")[2] for found, *_ in own} == declared


# --- settings and reference


def test_the_page_of_settings_has_every_field_once():
    found = re.findall(r'<code id="([\w.]+)">', settings.page())
    assert sorted(found) == sorted(settings.names())
    assert "| `compute` | lays the work out" in settings.page()


def test_the_reference_has_every_public_name_once():
    text = "".join(reference.pages().values())
    for name in [*mosaic_jax._HOMES, *mosaic_jax._MODULES]:
        assert text.count(f"      heading: mj.{name}\n") == 1
    for module in reference.modules():
        assert (ROOT / "mosaic_jax" / f"{module.replace('.', '/')}.py").is_file()


# --- code


def names_exist(code):
    """Every attribute of `mj` is one of the library's."""
    for node in ast.walk(ast.parse(code)):
        path = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"mj(\.\w+)+", path):
            operator.attrgetter(path.removeprefix("mj."))(mosaic_jax)


def code_of(page):
    """The Python of a page of Markdown, from top to bottom."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cells_of_a_notebook_compile(path):
    cells = [one for one in notebooks.read(path).cells if one.cell_type == "code"]
    assert len(cells) > 8
    for cell in cells:
        compile(cell.source, str(path), "exec")
    names_exist("\n".join(cell.source for cell in cells))


@pytest.mark.parametrize("path", [*HOW_TO, DOCS / "concepts.md"], ids=name_of)
def test_code_of_a_page_compiles(path):
    compile(code_of(path), str(path), "exec")
    names_exist(code_of(path))


def test_names_that_are_not_there_are_found():
    with pytest.raises(AttributeError):
        names_exist("import mosaic_jax as mj\nmj.Studdy()")


def test_outputs_of_a_cell_are_shown_but_for_progress():
    notebook = notebooks.read(NOTEBOOKS[0])
    first = next(one for one in notebook.cells if one.cell_type == "code")
    first.outputs = [
        types.SimpleNamespace(output_type="stream", name="stderr", text="50 %"),
        types.SimpleNamespace(output_type="stream", name="stdout", text="a < b"),
        types.SimpleNamespace(output_type="display_data", data={"image/png": "iV\n"}),
    ]
    page = notebooks.page(NOTEBOOKS[0], notebook)
    assert "a &lt; b" in page and "base64,iV" in page and "50 %" not in page
    assert page.startswith("# First study in five minutes\n\n*This page is a notebook")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs(path, tmp_path):
    notebook = notebooks.read(path)
    notebooks.execute(notebook, tmp_path)
    shown = [cell for cell in notebook.cells if "plt.show()" in cell.source]
    assert shown and all("image/png" in str(cell.outputs) for cell in shown)
    assert "text/html" in str(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("path", HOW_TO, ids=name_of)
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = types.ModuleType(f"notebook_of_{path.stem}")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    exec(compile(code_of(path), str(path), "exec"), vars(notebook))
    assert list(tmp_path.glob("runs/*/summary.json"))


# --- the site itself


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the site is served."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)
    serve = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_pages_ask_for_nothing_outside_and_fit_the_screen(site, width, scheme):
    url, folder = site
    found = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.html")
    )
    assert len(found) > 60
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        size = {"width": width, "height": 900}
        view = browser.new_page(viewport=size, color_scheme=scheme)
        told, asked = [], []
        view.on("console", lambda message: told.append(message.text))
        view.on("pageerror", lambda error: told.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        for path in found:
            view.goto(f"{url}/{path}")
            wide = view.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, path
        assert told == []
        assert [one for one in asked if not one.startswith((url, "data:"))] == []
        browser.close()


@pytest.mark.slow
def test_names_of_settings_are_links(site):
    _, folder = site
    page = pathlib.Path(folder, "cards", "fedprox.html").read_text()
    assert 'href="../reference/settings.html#methods.fedprox.mu"' in page
    assert "<math" in page and "$$" not in page
