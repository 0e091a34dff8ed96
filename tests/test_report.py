"""Pages from run directories that this test writes; looked at by a real browser."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright import sync_api

from mosaic_jax import errors, files
from mosaic_jax.report import __main__ as command
from mosaic_jax.report import comparison, figures, html, page, runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VERSIONS = {"python": "3.11", "jax": "0.0"}


def write_run(
    path, *, num_clients=4, num_classes=3, method="mosaic", seed=0, alpha=0.1, name="x"
):
    """A finished study's files, with every finding that a report can show."""
    np_rng = np.random.RandomState(seed)
    count = np_rng.randint(0, 50, (num_clients, num_classes))
    count[0] = 30
    label = np_rng.randint(0, num_classes, 200)
    right = np.where(np_rng.rand(200) < 0.8, label, 0)
    rounds = [
        {"stage": "init", "loop": "round", "step": s, "time": 0.0, "loss": 1.0}
        | {"test_accuracy": s / 10}
        for s in (2, 4, 6)
    ]
    cost = {
        "seconds": 3.0,
        "time": {"computing": 1.5, "compiling": 1.0, "waiting": 0.5},
        "peak_memory_bytes": 10**9,
        "flops": 2e12,
    }

    def record(results=(), up=(), history=()):
        return {
            "provides": [],
            "results": dict(results),
            "up": dict(up),
            "down": dict(up),
            "history": list(history),
            **cost,
        }

    found = {"test_accuracy": 0.6, "predictions": right.tolist()}
    own = {"client_test_accuracy": np_rng.rand(num_clients).tolist()}
    matrix = np_rng.rand(num_classes, num_classes).tolist()
    records = {
        "init": record(found | own, {"models": 6000, "label_counts": 48}, rounds),
        "generators": record({"collapsed_clients": [1]}, {"generators": 3000}),
        "experts": record({"expert_class_accuracy": matrix}),
        "prototypes": record({"num_prototypes": 9}, {"prototypes": 500}),
        "meta": record(
            {"teacher": found, "reliance": matrix, "attention": matrix}
            | {"gate_weight": matrix}
        ),
        "distill": record(found),
        "finetune": record(found, {"models": 2000}, rounds),
    }
    for stage, content in records.items():
        folder = path / "stages" / stage / "abc"
        folder.mkdir(parents=True)
        identity = {"stage": stage, "fingerprint": "abc", "seed": seed}
        files.write_json(folder / "done.json", content | {"identity": identity})
    shown = min(num_clients, 20)
    np.savez(
        path / "stages" / "generators" / "abc" / "pictures.npz",
        share=np.array([0.5, 1.0]),
        client=np.arange(shown),
        film=np_rng.randint(0, 256, (shown, 2, 8, 16, 16, 3)).astype(np.uint8),
        real=np_rng.randint(0, 256, (shown, 8, 16, 16, 3)).astype(np.uint8),
    )
    settings = {
        "method": method,
        "seed": seed,
        "data": {
            "name": name,
            "split": "dirichlet_balanced",
            "alpha": alpha,
            "num_clients": num_clients,
        },
        "model": {"name": "cnn", "others": [], "rate": 1.0},
        "init": {"method": "fedavg"},
        "server": {"method": "none", "when": "once", "rounds": 1},
        "meta": {"steps": 10},
        "distill": {"steps": 10},
    }
    config = {"settings": settings, "command": ["launch.py"], "git_revision": "abc"}
    files.write_json(path / "config.json", config)
    split = {
        "sha256": "0" * 64,
        "label_counts": count.tolist(),
        "held_out_labels": {"test": label.tolist()},
    }
    files.write_json(path / "split.json", split)
    summary = {
        "method": method,
        "dataset": name,
        "seed": seed,
        "partition": {"sha256": "0" * 64},
        "test_accuracy": {"init": 0.5, "teacher": 0.7, "distilled": 0.6, "final": 0.8},
        "collapsed_generators": [1],
        "rounds": 12,
        "padding_waste": {"generators": 1.01},
        "communication_bytes": {
            "up": {"models": 8000, "generators": 3000},
            "down": {"models": 8000},
        },
        "budgets": [],
        "seconds": dict.fromkeys(records, 3.0),
        "flops": dict.fromkeys(records, 2e12),
        "device": "1 x cpu",
        "versions": VERSIONS,
        "stages": dict.fromkeys(records, "abc"),
    }
    files.write_json(path / "summary.json", summary)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "few")
    write_run(root / "many", num_clients=1000, num_classes=100)
    for seed in (0, 1):
        write_run(root / "seeds" / f"seed_{seed}", seed=seed, alpha=1.0)
    return root


def test_curve_and_bytes_by_hand(folder):
    curve = runs.read(folder / "few").curve()
    assert curve["round"].tolist() == [2, 4, 6, 8, 10, 12]
    # Label counts before the first round, a third of the models with each record;
    # before finetuning also generators and prototypes.
    first = [48 + 2000, 48 + 4000, 48 + 6000]
    before = 48 + 6000 + 3000 + 500
    expected = [*first, before + 2000 / 3, before + 4000 / 3, before + 2000]
    np.testing.assert_allclose(curve["bytes"], expected)


def test_confusion_and_classes_by_hand(folder):
    run = runs.read(folder / "few")
    label = np.array(run.split["held_out_labels"]["test"])
    predicted = run.predictions()["final"]
    matrix = run.confusion("final")
    assert matrix[1, 0] == np.sum((label == 1) & (predicted == 0))
    assert run.per_class("final")[2] == np.mean(predicted[label == 2] == 2)


def test_seeds_are_one_group(folder):
    groups = runs.collect([folder / "few", folder / "seeds"])
    assert {name: len(group) for name, group in groups.items()} == {
        "few": 1,
        "seeds": 2,
    }


def test_thousand_clients_are_searched_not_listed(folder):
    text = page.write(folder / "many").read_text()
    assert len(text) < 10_000_000
    assert text.count("<tr>") < 200
    data = re.search(r'id="clients-data">(.*?)</script>', text)[1]
    assert len(json.loads(data)) == 1000


def test_every_string_is_escaped(tmp_path):
    name = '</script><img src=x onerror="alert(1)">'
    write_run(tmp_path / "bad", name=name, num_clients=100)
    text = page.write(tmp_path / "bad").read_text()
    assert name not in text
    assert "<img src=x" not in text
    assert "&lt;/script&gt;" in text
    assert html.searchable(["a"], [[name]], "b").count("</script>") == 2


def test_differences_in_settings_are_told(folder, capsys):
    output = folder / "compare.html"
    paths = [str(folder / name) for name in ("few", "seeds")]
    assert command.main([*paths, "-o", str(output)]) == 0
    text = output.read_text()
    rows = re.findall(r'<th scope="row">([\w.]+)</th>', text)
    assert "data.alpha" in rows
    assert "seed" not in rows
    assert 'href="few/report.html"' in text
    assert "| seeds | 80.0 |" in capsys.readouterr().out


def test_a_run_that_is_not_finished(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert command.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "summary.json: is missing" in error


def test_no_run_at_all(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pictures.npz"])
def test_damaged_pictures_are_left_out(tmp_path, name):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "stages" / "generators" / "abc" / name
    path.write_bytes(path.read_bytes()[:100])
    assert "after 50 %" not in page.write(tmp_path / "run").read_text()


def test_damaged_records_are_one_error(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "stages" / "init" / "abc" / "done.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(errors.DataError, match="is damaged"):
        page.write(tmp_path / "run")


def test_ink_follows_the_theme():
    drawn = figures.bars({"a": {"mean": 0.5, "spread": 0.1}})
    text = figures.svg(drawn, "label")
    assert figures.INK not in text and "currentColor" in text
    assert figures.COLOURS[5].lower() not in text and "var(--c5)" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("which", ["few", "many", "several", "methods"])
def test_in_a_browser(folder, which):
    path = folder / which / "report.html"
    if which == "several":
        path = folder / "several" / "compare.html"
        paths = [str(folder / name) for name in ("few", "seeds")]
        assert command.main([*paths, "-o", str(path)]) == 0
    elif which == "methods":
        term = {"seed": 0, "split_sha256": 64 * "a", "model": {"others": ()}}
        comparison.write(
            runs.collect([folder / "few"]), path, title="x", terms={"0": term}
        )
    else:
        page.write(path.parent)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        for width, scheme in ((400, "light"), (1200, "light"), (1200, "dark")):
            size = {"width": width, "height": 900}
            view = browser.new_page(viewport=size, color_scheme=scheme)
            told, asked = [], []
            view.on("console", lambda message, told=told: told.append(message.text))
            view.on("pageerror", lambda error, told=told: told.append(str(error)))
            view.on("request", lambda one, asked=asked: asked.append(one.url))
            view.goto(pathlib.Path(path).as_uri())
            assert told == []
            # Nothing but the page itself.
            assert [url for url in asked if not url.startswith("data:")] == [view.url]
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            violations = Axe().run(view)
            assert violations.violations_count == 0, violations.generate_report()
            if which == "many":
                assert view.locator("#clients-rows tr").count() == 50
                view.keyboard.press("Tab")
                view.fill("#clients-search", "777")
                assert view.locator("#clients-rows th").first.inner_text() == "777"
            view.close()
        browser.close()
