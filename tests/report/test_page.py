"""Pages of run directories that this test writes."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from mosaic_jax.core import files
from mosaic_jax.report import glossary, headline, html, page, runs
from mosaic_jax.stages import sections
from tests.report import saved


@pytest.fixture(scope="module")
def text(folder):
    """The page of the run of few clients."""
    return page.write(folder / "few").read_text()


def headings(text):
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def add_stage(run, name, content, pictures=()):
    """A further stage of the run."""
    saved.write_stage(run, name, content, pictures)
    summary = files.read_json(run / "summary.json")
    summary["stages"][name] = saved.FINGERPRINT
    files.write_json(run / "summary.json", summary)


def test_sections_stand_in_order_and_once(text):
    assert headings(text) == [
        "Accuracy",
        "Training",
        "Classes",
        "Clients",
        "Generators",
        "Experts and teacher",
        "Audit",
        "Costs",
        "Settings and environment",
        "Terms",
    ]


@pytest.mark.usefixtures("text")
def test_everything_is_drawn(folder):
    names = {path.stem for path in (folder / "few" / "figures").glob("*.png")}
    assert names == {
        "accuracy",
        "accuracy_bytes",
        "audit",
        "communication",
        "confusion",
        "experts",
        "generated",
        "label_counts",
        "per_class",
        "reliance",
        "seconds",
        "training_finetune_round",
        "training_init_round",
    }


def test_a_stage_nobody_knows_has_its_section(tmp_path):
    run = saved.write_run(tmp_path / "run")
    own = saved.section("My own", sections.Text("What it found."))
    more = saved.section("Costs", sections.Text("It was dear."))
    add_stage(run, "mine", saved.record(section=own))
    add_stage(run, "yours", saved.record(section=more))
    text = page.write(run).read_text()
    assert headings(text)[-4:] == [
        "My own",
        "Costs",
        "Settings and environment",
        "Terms",
    ]
    assert "<p>What it found.</p>" in text
    assert text.index("It was dear.") > text.index('id="costs"')


def test_headline_numbers(text):
    cards = dict(
        (name, value)
        for value, name in re.findall(
            r"<li><strong>(.*?)</strong><span>(.*?)</span>", text
        )
    )
    assert cards == {
        "test accuracy of the final model": "80.00 %",
        "MB sent by clients": "0.0",
        "seconds": "24",
        "membership-inference AUC": "0.512",
    }
    assert '<th scope="row">coverage</th><td>0.900 [0.500, 0.525]</td>' in text


def test_findings_on_clients_are_columns(text):
    for column in ("own model after FedAvg", "generator", "membership AUC"):
        assert f'<th scope="col">{column}</th>' in text


def test_thousand_clients_are_searched_not_listed(folder):
    text = page.write(folder / "many").read_text()
    assert len(text) < 10_000_000
    assert text.count("<tr>") < 200
    data = re.search(r'id="clients-data">(.*?)</script>', text)[1]
    assert len(json.loads(data)) == 1000


def test_every_string_is_escaped(tmp_path):
    name = '</script><img src=x onerror="alert(1)">'
    run = saved.write_run(tmp_path / "bad", name=name, num_clients=100)
    own = saved.section(
        name,
        sections.Text(name),
        sections.Table((name, name), [(name, name)], name),
        sections.Scatter("own", [1], [1], name, name, 0.5, name),
        sections.Strips("pictures", (name, name), (name,), ("x",), name),
    )
    image = {"x": np.zeros((1, 4, 4, 1), np.uint8)}
    clients = {name: {"0": name}}
    add_stage(run, "mine", saved.record(section=own, clients=clients), image)
    text = page.write(run).read_text()
    assert name not in text
    assert "<img src=x" not in text
    assert "&lt;/script&gt;" in text
    assert html.searchable(["a"], [[name]], "b").count("</script>") == 2


def test_damaged_pictures_are_left_out(tmp_path, caplog):
    run = saved.write_run(tmp_path / "run")
    assert "after 50 %" in page.write(run).read_text()
    path = run / "stages" / "generators" / saved.FINGERPRINT / "pictures.npz"
    path.write_bytes(path.read_bytes()[:100])
    text = page.write(run).read_text()
    assert "after 50 %" not in text
    assert "Collapsed generators" in text
    assert "is damaged; the report is without it" in caplog.text


def test_the_headline(text, folder, tmp_path):
    told = re.search(r'<p class="headline">(.*?)</p>', text)[1].replace("\xa0", " ")
    assert told.startswith("Final model 80.0 %: 30.0 points above FedAvg (50.0 %); its")
    assert (
        "its teacher has 70.0 %; before the last rounds it had 60.0 %; who sees" in told
    )
    assert told.endswith("with an AUC of 0.51 (0.5 is chance).")
    run = runs.read(folder / "few")
    summary = dataclasses.replace(run.summary, headline={}, test_accuracy={"init": 0.9})
    summary.test_accuracy["final"] = 0.8
    told = headline.sentence(dataclasses.replace(run, summary=summary))
    assert "10.0 points below FedAvg" in told and "teacher" not in told
    summary.test_accuracy["init"] = 0.8
    told = headline.sentence(dataclasses.replace(run, summary=summary))
    assert told.replace("\xa0", " ") == "Mosaic 80.0 % after 12 rounds."


def test_terms_are_told_where_they_stand_and_below(text):
    meaning = glossary.TERMS["teacher"]
    assert f'<abbr title="{meaning}">teacher</abbr>' in text
    assert f"<dt>teacher</dt><dd>{meaning}</dd>" in text
    assert "<dt>personal</dt>" not in text
    assert ">FedAvg</th>" in text and ">init</th>" not in text


def test_figures_carry_their_numbers(text):
    found = dict(
        re.findall(r'download="(\w+).csv" href="data:text/csv;base64,(.*?)"', text)
    )
    lines = base64.b64decode(found["accuracy"]).decode().splitlines()
    assert lines[0] == "series,federated round,test accuracy"
    assert lines[1] == "FedAvg,2,0.2"
    lines = base64.b64decode(found["training_init_round"]).decode().splitlines()
    assert lines[:2] == ["series,step,loss", "loss,2,1"]


def test_images_are_large_at_the_ends_of_training(text):
    pairs = re.search(r'<ul class="pairs">(.*?)</ul>', text, re.DOTALL)[1]
    assert pairs.count("<li>") == 4 and pairs.count("<img") == 8
    assert "<span>real</span>" in pairs and "after 50 %" not in pairs
    assert "All moments: real, after 50 %, after 100 %" in text
