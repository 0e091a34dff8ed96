"""Pages looked at by a real browser: they stand alone, and everyone can read them."""

import pathlib
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright import sync_api

from mosaic_jax.report import comparison, page, runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def written(folder, which):
    """Where the page is, after it is written."""
    if which in ("few", "many"):
        return page.write(folder / which)
    path = folder / which / "compare.html"
    groups = runs.collect([folder / "few", folder / "seeds"])
    if which == "several":
        comparison.write(groups, path, title="x")
    else:
        term = {"seed": 0, "split_sha256": 64 * "a", "model": {"others": ()}}
        comparison.write({"few": groups["few"]}, path, title="x", terms={"0": term})
    return path


def views(path, *looks):
    """The page at each width and colour scheme, checked before and after its use.

    It tells no error, asks for nothing but itself, is no wider than the screen, and axe
    finds nothing.
    """
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for width, scheme in looks:
            size = {"width": width, "height": 900}
            view = browser.new_page(viewport=size, color_scheme=scheme)
            told, asked = [], []
            view.on("console", lambda message, told=told: told.append(message.text))
            view.on("pageerror", lambda error, told=told: told.append(str(error)))
            view.on("request", lambda one, asked=asked: asked.append(one.url))
            view.goto(pathlib.Path(path).as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            yield view
            assert told == []
            assert [url for url in asked if not url.startswith("data:")] == [view.url]
            violations = Axe().run(view)
            assert violations.violations_count == 0, violations.generate_report()
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            view.close()
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    "which",
    [
        "few",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("many", "several", "methods")
        ),
    ],
)
def test_in_a_browser(folder, which):
    looks = (400, "light"), (1200, "light"), (1200, "dark")
    for view in views(written(folder, which), *looks):
        for details in view.locator("summary").all():
            details.click()
        meanings = view.locator(".explained td.prose").all()
        assert meanings or which not in ("few", "many")
        for meaning in meanings:
            box = meaning.bounding_box()
            assert box and box["x"] + box["width"] <= view.viewport_size["width"]
        if which == "many":
            assert view.locator("#clients-rows tr").count() == 50
            view.keyboard.press("Tab")
            view.fill("#clients-search", "777")
            assert view.locator("#clients-rows th").first.inner_text() == "777"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_charts_take_the_place_of_drawings_on_screens_alone(folder):
    path = page.write(folder / "few", interactive=True)
    for view in views(path, (400, "light"), (1200, "dark")):
        charts = view.locator("figure:has([data-chart])")
        assert charts.count() == view.locator("figure").count() > 8
        for chart in charts.all():
            assert chart.locator(".main-svg").first.is_visible()
            assert not chart.locator("> svg").is_visible()
        view.emulate_media(media="print")
        assert charts.first.locator("> svg").is_visible()
        assert not charts.first.locator(".main-svg").first.is_visible()
        view.emulate_media(media="screen")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_figures_are_saved(folder, tmp_path):
    path = written(folder, "few")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        view = browser.new_page()
        view.goto(pathlib.Path(path).as_uri())
        figure = view.locator('figure[data-name="accuracy"]')
        found = {}
        for kind in ("SVG", "PNG", "CSV"):
            with view.expect_download() as got:
                figure.get_by_text(kind, exact=True).click()
            name = got.value.suggested_filename
            got.value.save_as(tmp_path / name)
            found[name] = (tmp_path / name).read_bytes()
        browser.close()
    assert set(found) == {"accuracy.svg", "accuracy.png", "accuracy.csv"}
    drawing = found["accuracy.svg"].decode()
    # It stands alone: no colour of the page's style sheet is left to be looked up.
    assert drawing.startswith("<svg") and "var(" not in drawing
    assert "currentColor" not in drawing and "#0072b2" in drawing
    assert found["accuracy.png"][:4] == b"\x89PNG" and len(found["accuracy.png"]) > 5000
    assert found["accuracy.csv"].startswith(b"series,federated round,test accuracy")
