"""Every file of a run directory in turn: damaged, then the study is run again.

Either the damage is told and mended, or it is harmless: the same numbers, or one line.
"""

import json
import logging
import shutil

import numpy as np
import pytest

from mosaic_jax import report
from mosaic_jax.core import errors, files, trees
from mosaic_jax.data import sources
from mosaic_jax.run import runner
from tests import running, tiny

FIELDS = {
    "method": "federated",
    "model__norm": "group",
    "init__rounds": 2,
    "warmup__rounds": 2,
}


def flip(data, np_rng):
    place = np_rng.randint(len(data))
    bit = 1 << np_rng.randint(8)
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


DAMAGES = {
    "flip": flip,
    "truncate": lambda data, np_rng: data[: np_rng.randint(len(data))],
    "empty": lambda data, np_rng: b"",
    "delete": None,
}


def damage(path, kind, np_rng):
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif data:
        path.write_bytes(DAMAGES[kind](data, np_rng))


def outcome(workdir, changes, *, reports=True):
    """Accuracies and parameters of a run in `workdir`, and its report."""
    study = runner.Experiment(tiny.study(**changes), workdir)
    summary = study.run()
    if reports:
        report.write(workdir)
    model = list(running.artifacts(study).values())[-1]
    return summary.test_accuracy, trees.digest(model)


def check(original, workdir, changes, expected, kind, relative, np_rng):
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(original, workdir)
    damage(workdir / relative, kind, np_rng)
    # One line for people, never a traceback.
    try:
        # No report reads artifacts.
        reports = "artifacts" not in relative.parts
        found = outcome(workdir, changes, reports=reports)
    except errors.MosaicError as error:
        assert "\n" not in str(error), (relative, kind)
        return
    assert found == expected, (relative, kind)
    for name in ("config.json", "split.json", "summary.json"):
        files.read_json(workdir / name)


def listed(root):
    paths = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    # Pictures are drawn anew each time.
    return [path for path in paths if "figures" not in path.parts]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original")
    return workdir, outcome(workdir, FIELDS)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_files_of_a_finished_run(original, tmp_path, every):
    workdir, expected = original
    np_rng = np.random.RandomState(0)
    kinds = list(DAMAGES)
    for i, relative in enumerate(listed(workdir)[::every]):
        kind = kinds[i % len(kinds)]
        check(workdir, tmp_path / "run", FIELDS, expected, kind, relative, np_rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_of_mosaic_in_every_way(tmp_path, kind):
    changes = {"audit__images": 8}
    expected = outcome(tmp_path / "original", changes)
    np_rng = np.random.RandomState(1)
    relatives = listed(tmp_path / "original")
    assert len(relatives) > 100
    for relative in relatives:
        check(
            tmp_path / "original",
            tmp_path / "run",
            changes,
            expected,
            kind,
            relative,
            np_rng,
        )


def test_a_number_in_a_record_is_never_believed(original, tmp_path, caplog):
    """A flipped digit is still JSON: the checksum tells."""
    workdir, expected = original
    shutil.copytree(workdir, tmp_path / "run")
    (path,) = (tmp_path / "run" / "stages" / "warmup").glob("*/done.json")
    accuracy = json.loads(path.read_text())["models"]["warmup"]["test_accuracy"]
    text = path.read_text().replace(
        f'"test_accuracy": {accuracy}', '"test_accuracy": 1'
    )
    assert text != path.read_text()
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert outcome(tmp_path / "run", FIELDS) == expected
    assert "done.json: is damaged; stage warmup runs again" in caplog.text


@pytest.mark.slow
def test_a_checkpoint_within_a_stage(tmp_path, caplog):
    """The newest one is damaged: the one before serves; both: the stage starts anew."""
    changes = FIELDS | {"init__rounds": 8, "evaluation__every": 2}
    whole = outcome(tmp_path / "whole", changes)
    for count in (1, 2):
        workdir = tmp_path / f"damaged{count}"
        study = runner.Experiment(tiny.study(**changes), workdir)
        running.stop_after(study, 3)
        (folder,) = (workdir / "stages" / "init").glob("*/checkpoints/round")
        steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=number)
        assert [number(step) for step in steps] == [4, 6]
        for step in steps[-count:]:
            for path in step.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"")
        with caplog.at_level(logging.WARNING, "mosaic_jax"):
            assert outcome(workdir, changes) == whole
        assert "is damaged" in caplog.text
        records = (workdir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in records] == [2, 4, 6, 8, 2]


def number(path):
    return int(path.name)


def test_cached_data_that_were_damaged_are_made_anew(tmp_path, caplog):
    _, arrays = sources.load("digits", tmp_path)
    (cache,) = (tmp_path / "cache").glob("*.npz")
    np_rng = np.random.RandomState(0)
    for kind in DAMAGES:
        for _ in range(5):
            damage(cache, kind, np_rng)
            _, again = sources.load("digits", tmp_path)
            assert trees.digest(vars(again)) == trees.digest(vars(arrays)), kind
