"""Several run directories side by side."""

import dataclasses
import re

import pytest

from mosaic_jax import stages
from mosaic_jax.report import comparison, runs
from tests import tiny
from tests.report import saved


@pytest.fixture(scope="module")
def compared(folder):
    """Text of the page and what was found."""
    for run in (folder / "few", *(folder / "seeds").iterdir()):
        (run / "report.html").touch()
    groups = runs.collect([folder / "few", folder / "seeds"])
    path = folder / "compare.html"
    rows = comparison.write(groups, path, title="Two studies")
    return path.read_text(), rows


def test_differences_in_settings_are_told(compared):
    text, rows = compared
    fields = re.findall(r'<th scope="row">([\w.]+)</th>', text)
    assert "data.alpha" in fields
    assert "seed" not in fields
    assert 'href="few/report.html"' in text
    assert "| seeds | 80.0 |" in comparison.table(rows)


def test_rows_have_means_and_spreads(compared):
    row = compared[1]["seeds"]
    assert row["seeds"] == [0, 1]
    assert row["test_accuracy"] == {"mean": 0.8, "spread": 0.0}
    assert row["validation_accuracy"]["mean"] == 0.75
    assert row["teacher_test_accuracy"]["mean"] == 0.7
    assert "personal_test_accuracy" not in row
    assert row["headline"]["coverage"] == {"mean": 0.9, "spread": 0.0}


def test_figures_have_room_beside_long_names(folder, tmp_path):
    """Else matplotlib leaves the axes away, with a warning, which is an error here."""
    groups = runs.collect([folder / "few", folder / "seeds"])
    named = dict(zip(["field=1," * 9, "field=2," * 9], groups.values(), strict=True))
    rows = comparison.write(named, tmp_path / "compare.html", title="Two studies")
    assert rows.keys() == named.keys()
    cells = dict(zip(["seed=1,a=1", "seed=1,a=2"], groups.values(), strict=True))
    rows = comparison.write(cells, tmp_path / "compare.html", title="Two cells")
    assert rows.keys() == cells.keys()
    text = (tmp_path / "compare.html").read_text()
    assert "all with seed=1" in text and text.count("seed=1") == 1


def test_only_what_some_study_has_is_a_column(compared):
    head, cells = comparison.columns(compared[1])
    assert head[:5] == [
        "study",
        "test accuracy, %",
        "teacher, %",
        "distilled, %",
        "membership-inference AUC",
    ]
    assert cells[1][4] == "0.512"
    assert "coverage" not in head


def test_figures_are_in_files_too(folder, compared):
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        "methods",
        "rounds",
        "bytes",
        "classes",
        "seconds",
        "mb_up",
        "mb_down",
    }


@pytest.mark.parametrize(
    "server, methods, expected",
    [
        ({"method": "none"}, {}, "none"),
        ({"method": "dense", "when": "once", "rounds": 2}, {}, "once, 2 rounds"),
        (
            {"method": "feddf", "when": "once", "rounds": 2},
            {},
            "once, 2 rounds; clients also train GANs",
        ),
        ({"method": "dfrd", "when": "every_round"}, {}, "every round, 10 iterations"),
        (
            {"method": "dfrd", "when": "every_round"},
            {"dfrd": {"iterations": 1}},
            "every round, 1 iterations",
        ),
        ({"method": "mine:Method", "when": "every_round"}, {}, "every round"),
    ],
)
def test_work_of_the_server(server, methods, expected):
    settings = {
        "method": "federated",
        "model": {"rate": 1.0},
        "init": {"method": "fedavg"},
        "server": server,
        "methods": methods,
    }
    assert comparison.server_work(settings) == expected
    settings["model"]["rate"] = 0.25
    assert comparison.server_work(settings) == f"{expected}; networks of rate 0.25"


def test_what_only_measures_is_what_the_last_model_does_not_need():
    study = tiny.study(audit__images=4, leakage__images=4)
    chain, part, needed = stages.chain(study), {"finetune"}, set()
    for link in reversed(chain):
        if link.name in part or needed & set(link.provides(study)):
            part.add(link.name)
            needed |= set(link.needs(study))
    assert {link.name for link in chain} - part == comparison.MEASURING


def test_costs_are_means_over_seeds_of_what_belongs_to_a_method(tmp_path):
    group = []
    for seed, number in enumerate((1.0, 4.0)):
        run = runs.read(saved.write_run(tmp_path / f"{seed}", seed=seed))
        stages = ("init", "reference", "audit", "leakage", "distill")
        changed = dataclasses.replace(
            run.summary,
            flops=dict.fromkeys(stages, number * 1e12),
            seconds=dict.fromkeys(stages, 10 * number),
            communication_bytes={
                # One seed has a payload that the other lacks.
                "up": {"models": number * 1e6} | ({"anchor": 2e6} if seed else {}),
                "down": {"models": number * 2e6},
            },
        )
        run = dataclasses.replace(run, summary=changed)
        group.append(run)
    head, ((_, *cells),) = comparison.columns(comparison.summarise({"a": group}))
    found = dict(zip(head[1:], cells, strict=True))
    assert found["MB up"] == "3.5" and found["TFLOP"] == "5"
    assert found["seconds"] == "50"


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("fedproto", "none"), ("fedtgp", "every round, prototypes"), ("mine:Fed", "none")],
)
def test_work_of_the_server_in_an_algorithm(algorithm, expected):
    settings = {
        "method": "federated",
        "init": {"method": algorithm},
        "model": {"rate": 1.0},
        "server": {"method": "none"},
    }
    assert comparison.server_work(settings) == expected


def test_rates_are_drawn(tmp_path):
    run = runs.read(saved.write_run(tmp_path / "run"))
    run.records["finetune"].results["rate_accuracy"] = {"1.0": 0.8, "0.5": 0.7}
    path = tmp_path / "compare" / "compare.html"
    rows = comparison.write({"run": [run]}, path, title="One")
    assert "its part of rate 0.5, %" in comparison.table(rows)
    assert (path.parent / "figures" / "rates.png").exists()
