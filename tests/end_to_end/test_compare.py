"""Several methods in one run directory, on equal terms."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors, trees
from mosaic_jax.run import fairness, methods, runner
from tests import running, tiny

pytestmark = pytest.mark.slow

FIELDS = {
    "init__rounds": 2,
    "warmup__rounds": 0,
    "finetune__rounds": 1,
    "evaluation__every": 1,
    "server__rounds": 2,
    **{f"methods__{name}__batch_size": 8 for name in ("dense", "fedftg", "dfrd")},
    **{f"methods__{name}__width": 2 for name in ("dense", "fedftg", "dfrd")},
    "methods__dense__generator_steps": 2,
    "methods__dense__pool": 2,
    "methods__fedftg__iterations": 1,
    "methods__dfrd__iterations": 1,
}
METHODS = ("fedavg", "fedavg_decay", "fedbn", "dense", "dfrd")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compared")
    config = tiny.config(compare=",".join(METHODS), **FIELDS).to_dict()
    assert launch.run(config, workdir) == 0
    return workdir, json.loads((workdir / "comparison.json").read_text())


def test_a_method_that_diverges_stops_no_other(compared, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(compared[0], tmp_path / "compared")
    config = tiny.config(compare=",".join(METHODS), **FIELDS).to_dict()
    together = runner.run_together

    def diverges(works):
        if works[0].workdir.name == "dense":
            raise errors.DivergedError("server: loss is nan")
        return together(works)

    monkeypatch.setattr(runner, "run_together", diverges)
    assert launch.run(config, workdir) == 3
    assert capsys.readouterr().err.endswith("error: dense: server: loss is nan\n")
    found = json.loads((workdir / "comparison.json").read_text())
    assert found["failed"] == {"dense": "server: loss is nan"}
    assert [*found["methods"]] == [name for name in METHODS if name != "dense"]


def test_every_method_has_its_row_and_run_directory(compared):
    workdir, found = compared
    assert tuple(found["methods"]) == METHODS
    for name, row in found["methods"].items():
        summary = json.loads((workdir / name / "summary.json").read_text())
        assert row["test_accuracy"]["mean"] == summary["test_accuracy"]["final"]
        assert summary["rounds"] == 3
        # Three clients send a model in each of three rounds, whoever trains it after.
        assert (
            row["bytes_up"]["models"]
            == found["methods"]["fedavg"]["bytes_up"]["models"]
        )
    assert "personal_test_accuracy" in found["methods"]["fedbn"]
    assert "personal_test_accuracy" not in found["methods"]["fedavg"]
    assert found["methods"]["dense"]["server"] == "once, 2 rounds"
    assert found["methods"]["dfrd"]["server"] == "every round, 1 iterations"
    page = (workdir / "comparison.html").read_text()
    assert all(name in page for name in METHODS)
    names = {path.stem for path in (workdir / "figures").glob("*.png")}
    assert names == {
        "methods",
        "rounds",
        "bytes",
        "classes",
        "seconds",
        "mb_up",
        "mb_down",
    }


@pytest.mark.parametrize("name", METHODS)
def test_templates_are_what_stages_provide(compared, name):
    workdir, _ = compared
    study = methods.with_method(tiny.study(**FIELDS), name)
    running.check_templates(runner.Experiment(study, workdir / name))


def test_equal_terms_are_recorded(compared):
    workdir, found = compared
    split = json.loads((workdir / "fedavg" / "split.json").read_text())
    assert found["equal_terms"]["0"]["split_sha256"] == split["sha256"]
    assert len(found["equal_terms"]["0"]["batch_order_sha256"]) == 64


def test_a_second_run_computes_nothing_again(compared, capsys):
    workdir, _ = compared
    config = tiny.config(compare=",".join(METHODS), **FIELDS).to_dict()
    records = sorted(workdir.glob("*/stages/*/*/done.json"))
    before = [path.stat().st_mtime_ns for path in records]
    assert launch.run(config, workdir) == 0
    assert [path.stat().st_mtime_ns for path in records] == before
    assert "| dfrd |" in capsys.readouterr().out


def test_methods_on_other_terms_are_refused(tmp_path):
    study = tiny.study(method="federated", **FIELDS)
    local = dataclasses.replace(study.local, steps=5)
    studies = {
        name: [runner.Experiment(settings, tmp_path / name)]
        for name, settings in (
            ("fedavg", study),
            ("other", dataclasses.replace(study, local=local)),
        )
    }
    with pytest.raises(errors.ConfigError, match="compare: local of other = "):
        fairness.check_fair(studies)


def test_an_unknown_method_ends_before_work(tmp_path, capsys):
    config = tiny.config(compare="fedavg,fedprx").to_dict()
    assert launch.run(config, tmp_path / "new") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: init.method = 'fedprx': must be one of fedavg, ")
    assert told.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("algorithm", ["fedavg", "feddyn"])
def test_where_a_stage_ends_changes_nothing(algorithm, tmp_path):
    """Three rounds in one stage are one and two in two, with all states carried."""
    final = []
    for init, warmup in ((3, 0), (1, 2)):
        fields = FIELDS | {
            "finetune__rounds": 0,
            "init__rounds": init,
            "warmup__rounds": warmup,
            "init__method": algorithm,
        }
        study = tiny.study(method="federated", **fields)
        work = runner.Experiment(study, tmp_path / str(init))
        work.run()
        final.append(list(running.artifacts(work).values())[-1])
    for name in ("global_model", "round_state"):
        one, other = (trees.flatten(artifacts[name]) for artifacts in final)
        assert one.keys() == other.keys()
        for place, leaf in one.items():
            np.testing.assert_array_equal(leaf, other[place])


def test_a_decay_to_the_same_rate_changes_nothing(tmp_path):
    rate = tiny.study().local.learning_rate
    study = tiny.study(**FIELDS | {"finetune__learning_rate": rate})
    final = []
    for name in ("fedavg", "fedavg_decay"):
        work = runner.Experiment(methods.with_method(study, name), tmp_path / name)
        work.run()
        final.append(list(running.artifacts(work).values())[-1])
    jax.tree.map(
        np.testing.assert_array_equal, final[0]["global_model"], final[1]["final_model"]
    )
