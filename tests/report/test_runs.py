"""What is read of run directories, by hand."""

import dataclasses

import numpy as np
import pytest

from mosaic_jax.core import errors, files
from mosaic_jax.report import runs
from tests.report import saved


def with_records(run, **records):
    """The same run after stages with these records."""
    return dataclasses.replace(run, records=records)


def test_curve_and_bytes_by_hand(folder):
    curve = runs.read(folder / "few").curve()
    assert curve["round"].tolist() == [2, 4, 6, 8, 10, 12]
    assert curve["stage"].tolist() == ["init"] * 3 + ["finetune"] * 3
    # Label counts before the first round, a third of the models with each record;
    # before finetuning also generators and prototypes.
    first = [48 + 2000, 48 + 4000, 48 + 6000]
    before = 48 + 6000 + 3000 + 500
    expected = [*first, before + 2000 / 3, before + 4000 / 3, before + 2000]
    np.testing.assert_allclose(curve["bytes"], expected)


def test_rounds_of_a_stage_of_any_name_are_on_the_curve(folder):
    own = saved.record(history=saved.history(), up={"models": 30, "code": 5})
    other = saved.record(history=[{"loop": "student", "step": 9, "loss": 1.0}])
    run = with_records(runs.read(folder / "few"), other=other, own=own)
    curve = run.curve()
    assert curve["stage"].tolist() == ["own"] * 3
    np.testing.assert_allclose(curve["bytes"], [35 / 3, 70 / 3, 35])


def test_no_rounds_make_an_empty_curve(folder):
    curve = with_records(runs.read(folder / "few"), own=saved.record()).curve()
    assert all(len(column) == 0 for column in curve.values())


def test_models_stand_in_order_of_time_and_none_twice(folder):
    run = runs.read(folder / "few")
    assert list(run.predictions()) == ["init", "teacher", "distilled", "final"]
    assert list(run.distinct_predictions()) == list(run.predictions())
    # A study that ends with its distilled model.
    del run.records["finetune"]
    assert list(run.distinct_predictions()) == ["init", "teacher", "distilled"]
    np.testing.assert_array_equal(
        run.predictions()["final"], run.predictions()["distilled"]
    )


def test_confusion_and_classes_by_hand(folder):
    run = runs.read(folder / "few")
    label, predicted = run.test_label, run.predictions()["final"]
    assert run.confusion()[1, 0] == np.sum((label == 1) & (predicted == 0))
    assert run.per_class()[2] == np.mean(predicted[label == 2] == 2)
    teacher = run.predictions()["teacher"]
    assert run.per_class("teacher")[2] == np.mean(teacher[label == 2] == 2)


def test_columns_of_several_networks_are_one(folder):
    run = with_records(
        runs.read(folder / "few"),
        init=saved.record(clients={"own": {"0": "a", "2": "c"}}),
        other=saved.record(clients={"own": {"1": "b"}, "rate": {"3": "0.5"}}),
    )
    expected = {"own": ["a", "b", "c", ""], "rate": ["", "", "", "0.5"]}
    assert run.client_columns() == expected


def test_the_last_stage_that_knows_parts_tells_their_accuracy(folder):
    run = runs.read(folder / "few")
    assert run.rate_accuracy() == {}
    found = [saved.record(results={"rate_accuracy": {"0.5": v}}) for v in (0.1, 0.2)]
    run = with_records(run, a=found[0], b=found[1], c=saved.record())
    assert run.rate_accuracy() == {"0.5": 0.2}


def test_seeds_are_one_group(folder):
    groups = runs.collect([folder / "few", folder / "seeds"])
    assert {name: len(group) for name, group in groups.items()} == {
        "few": 1,
        "seeds": 2,
    }


def test_no_run_at_all(tmp_path):
    with pytest.raises(errors.DataError, match="must be a run directory"):
        runs.collect([tmp_path])


def test_a_damaged_record_is_one_error(tmp_path):
    run = saved.write_run(tmp_path / "run")
    path = run / "stages" / "init" / saved.FINGERPRINT / "done.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(errors.DataError, match=r"is damaged.*the same command") as told:
        runs.read(run)
    assert "\n" not in str(told.value)


def test_a_record_of_another_study_is_refused(tmp_path):
    run = saved.write_run(tmp_path / "run")
    other = saved.write_run(tmp_path / "other", seed=1)
    path = f"stages/init/{saved.FINGERPRINT}/done.json"
    (run / path).write_bytes((other / path).read_bytes())
    with pytest.raises(errors.DataError, match="its seed is 1, not 0"):
        runs.read(run)


def test_a_section_that_is_none_is_one_error(folder):
    run = runs.read(folder / "few")
    own = saved.record(section={"title": "Own", "blocks": [{"kind": "Song"}]})
    run.summary.stages["own"] = saved.FINGERPRINT
    with pytest.raises(errors.DataError, match="no section of a report"):
        list(with_records(run, own=own).sections())


@pytest.mark.parametrize(
    "name, field",
    [
        ("summary.json", "headline"),
        ("split.json", "held_out_labels"),
        ("config.json", "settings"),
    ],
)
def test_files_of_an_earlier_version_are_one_error(tmp_path, name, field):
    path = saved.write_run(tmp_path / "run") / name
    content = files.read_json(path)
    del content[field]
    files.write_json(path, content)
    with pytest.raises(errors.DataError, match="made by another version") as told:
        runs.read(tmp_path / "run")
    assert "\n" not in str(told.value)


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    path = saved.write_run(tmp_path / "run") / "summary.json"
    content = files.read_json(path)
    content["stages"]["init"] = "../../elsewhere"
    files.write_json(path, content)
    with pytest.raises(errors.DataError, match="no name of a folder"):
        runs.read(tmp_path / "run")
