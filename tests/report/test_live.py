"""The page of a running study: what it is told, and who may ask."""

import http.client
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright import sync_api

from mosaic_jax.cli import watch
from mosaic_jax.core import errors, files
from mosaic_jax.report import live
from mosaic_jax.stages import films
from tests import launched
from tests.report import saved

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# A study of three stages, without Mosaic's: one that compiles in seconds.
BRIEF = ["method=federated", "init.rounds=8", "warmup.rounds=0", "finetune.rounds=0"]
BRIEF += ["evaluation.every=1"]


@pytest.fixture
def serving():
    """`serving(workdir)`: the port of a server that shows it."""
    servers = []

    def serve(workdir):
        servers.append(watch.server(workdir, 0))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port, path, method="GET", host="localhost"):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def run_under_way(path, **progress):
    saved.write_run(path)
    content = {"state": "running", "stage": "generators", "step": 20, "num_steps": 50}
    content |= {"stages": ["init", "generators"], "stages_done": ["init"]}
    content |= {"study_seconds_left": 75.0, "doing": "generators: at gan 21 of 50"}
    (path / "progress.json").write_text(json.dumps(content | progress))
    rows = [
        {"stage": "init", "loop": "round", "step": s, "time": 0, "test_accuracy": s / 9}
        | {"loss": 1 / s}
        for s in (1, 2, 3)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(lines + '{"stage": "in')  # being written
    return path


def test_what_a_study_tells(tmp_path):
    run = run_under_way(tmp_path / "run")
    told = live.overview(run, run)
    assert told["what"] == "Mosaic on x, 4 clients, seed 0"
    assert (told["state"], told["step"], told["num_steps"]) == ("running", 20, 50)
    assert (told["seconds_left"], told["done"]) == (75.0, ["init"])
    assert told["age"] < 50
    os.utime(run / "progress.json", (0, 0))
    assert live.overview(run, run)["age"] > 50
    (run / "progress.json").unlink()
    assert live.overview(run, run)["age"] is None
    assert told["test_accuracy"] == 0.8  # the last of the summary so far
    found = live.detail(run)
    assert list(found["accuracy"]) == ["FedAvg", "teacher", "distilled", "final"]
    accuracy, loss = found["curves"]
    assert accuracy["title"] == "init (FedAvg): round" and accuracy["step"] == [1, 2, 3]
    assert loss["lines"] == {"loss": [1, 0.5, 1 / 3]}
    assert len(found["clients"]) == 4
    image = Image.open(io.BytesIO(live.picture(run, 0)))
    assert image.size == (8 * 16, 4 * 16)
    (tmp_path / "none").mkdir()
    assert live.overview(tmp_path, tmp_path / "none")["state"] == "starting"


def test_images_of_a_stage_that_runs(tmp_path):
    run = run_under_way(tmp_path / "run")
    folder = run / "stages" / "generators@cnn" / "abc" / "checkpoints"
    folder.mkdir(parents=True)
    film = np.zeros((2, 4, 3, 5, 5, 1), np.uint8)
    film[0, :2], film[1, 0] = 7, 9
    film[0, 1] = 8
    files.write_arrays(folder / "pictures.npz", films.latest(film))
    stages = [one["stage"] for one in live.detail(run)["pictures"]]
    assert stages == ["generators", "generators@cnn"]
    pixels = np.asarray(Image.open(io.BytesIO(live.picture(run, 1))))
    assert pixels.shape == (10, 15)
    assert (pixels[:5] == 8).all() and (pixels[5:] == 9).all()
    # Once the stage is finished, what it showed meanwhile is no more.
    old = run / "stages" / "generators" / saved.FINGERPRINT / "checkpoints"
    old.mkdir()
    files.write_arrays(old / "pictures.npz", films.latest(film))
    assert [one["stage"] for one in live.detail(run)["pictures"]] == stages


def test_it_reads_and_answers_this_machine_alone(tmp_path, serving):
    run_under_way(tmp_path / "runs" / "a")
    (tmp_path / "secret.png").write_bytes(b"x")
    port = serving(tmp_path / "runs")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, headers, page = ask(port, "/")
    assert code == 200 and b"live.js" in page and b"<script>" not in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert json.loads(ask(port, "/data.json?study=a")[2])["studies"][0]["name"] == "a"
    assert ask(port, "/picture.png?study=a&number=0")[2].startswith(b"\x89PNG")
    for path in ("/../secret.png", "/secret.png", "/a/config.json", "/page.py"):
        assert ask(port, path)[0] == 404
    for query in ("", "?study=9&number=0", "?study=a&number=9", "?study=-1&number=x"):
        assert ask(port, f"/picture.png{query}")[0] == 404
    assert json.loads(ask(port, "/data.json?study=..")[2])["detail"] is None
    for host in ("example.org", "["):
        assert ask(port, "/data.json", host=host)[0] == 403
    assert ask(port, "/data.json", method="POST")[0] == 501
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_numbers_that_json_has_not_are_left_out(tmp_path, serving):
    run_under_way(tmp_path / "a", study_seconds_left=float("nan"))
    port = serving(tmp_path)

    def refuse(word):
        raise ValueError(word)

    told = json.loads(ask(port, "/data.json")[2], parse_constant=refuse)
    assert told["studies"][0]["seconds_left"] is None and told["detail"]["curves"]


def test_long_curves_end_at_the_newest_row(tmp_path):
    run = run_under_way(tmp_path / "run")
    row = {"stage": "init", "loop": "round", "time": 0, "loss": 1.0}
    lines = [json.dumps(row | {"step": step}) for step in range(1, 301)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (curve,) = live.detail(run)["curves"]
    assert curve["step"] == list(range(2, 301, 2))


def test_a_port_in_use_is_one_line(tmp_path, serving, capsys):
    port = serving(tmp_path)
    assert watch.main([str(tmp_path), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --port = {port}: ") and told.count("\n") == 1
    with pytest.raises(errors.ConfigError, match="is no folder"):
        watch.server(launched.ROOT / "launch.py", 0)


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


def opened(browser, port, width=1200):
    """The page, and what it complained of or asked from others."""
    view = browser.new_page(viewport={"width": width, "height": 900})
    bad = []
    view.on("console", lambda message: bad.append(message.text))
    view.on("pageerror", lambda error: bad.append(str(error)))
    own = f"http://127.0.0.1:{port}/"
    view.on(
        "request", lambda one: one.url.startswith((own, "data:")) or bad.append(one)
    )
    view.goto(own)
    return view, bad


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.slow
def test_a_study_is_watched_to_its_end(tmp_path, serving, browser):
    workdir = tmp_path / "run"
    port = serving(workdir)
    view, bad = opened(browser, port)
    view.get_by_text("Nothing there yet.").wait_for()
    view.evaluate("window.mark = 1")
    with launched.start(workdir, *(f"--config.{one}" for one in BRIEF)) as process:
        now = view.locator(".stages [aria-current]")
        now.wait_for(timeout=120_000)
        assert now.inner_text() == "init"
        view.locator(".cards").get_by_text("running").wait_for()
        view.get_by_text("compiling").first.wait_for()
        assert process.wait(timeout=300) == 0, process.stderr.read()
    view.locator(".cards").get_by_text("done").wait_for()
    summary = files.read_json(workdir / "summary.json")
    final = f"{100 * summary['test_accuracy']['final']:.1f} %"
    row = view.locator("tr", has_text="final")
    assert row.locator("td").inner_text() == final
    assert view.locator(".cards").get_by_text(final).count() == 1
    curve = view.get_by_role("img", name="init (FedAvg): round: test accuracy")
    points = curve.locator("polyline").first.get_attribute("points").split()
    assert len(points) == 8
    clients = view.get_by_role("region", name="Training images of each class")
    assert clients.locator("tbody tr").count() == 3
    assert view.locator(".stages .done").all_inner_texts() == ["init"]
    assert view.evaluate("window.mark") == 1  # never loaded again
    assert bad == []
    assert Axe().run(view).violations_count == 0


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_studies_of_a_sweep_are_rows(tmp_path, serving, browser):
    run_under_way(tmp_path / "a")
    os.utime(tmp_path / "a" / "progress.json", (0, 0))
    run_under_way(tmp_path / "b" / "seed_0", state="done")
    run_under_way(tmp_path / "c", state="failed", why="loss is not finite")
    view, bad = opened(browser, serving(tmp_path), width=400)
    rows = view.get_by_role("region", name="All studies").locator("tbody tr")
    rows.nth(1).wait_for()
    cells = rows.nth(0).locator("th, td").all_inner_texts()
    assert cells == ["a", "running", "generators: at gan 21 of 50", "1:15", "80.0 %"]
    assert rows.nth(1).locator("td").all_inner_texts()[:3] == ["done", "", ""]
    view.get_by_text("No news for").wait_for()
    rows.nth(1).get_by_role("button").click()
    view.locator(".cards").get_by_text("done").wait_for()
    assert rows.nth(1).get_by_role("button").get_attribute("aria-pressed") == "true"
    # One that sorts before it moves the row, and not what is chosen.
    run_under_way(tmp_path / "0", study_seconds_left=59.7)
    rows.nth(3).wait_for()
    assert rows.nth(0).locator("td").all_inner_texts()[2] == "1:00"
    assert rows.nth(2).get_by_role("button").get_attribute("aria-pressed") == "true"
    assert view.locator(".cards").get_by_text("done").count() == 1
    rows.nth(3).get_by_role("button").click()
    view.get_by_text("loss is not finite").wait_for()
    image = view.locator(".generated img")
    assert (
        image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= 400
    assert bad == []
    violations = Axe().run(view)
    assert violations.violations_count == 0, violations.generate_report()
