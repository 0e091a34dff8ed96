"""Files under a wrong name: what belongs to another study is never believed."""

import logging
import shutil

import jax.numpy as jnp
import pytest

from mosaic_jax.core import errors, files, trees
from mosaic_jax.report import runs as readers
from mosaic_jax.run import checkpoint, runner
from tests import running, tiny

MINE = {
    "method": "federated",
    "model__norm": "group",
    "init__rounds": 8,
    "warmup__rounds": 2,
    "evaluation__every": 2,
}
OTHERS = {
    "rate": MINE | {"local__learning_rate": 0.2},
    "seed": MINE | {"seed": 1},
    "images": MINE | {"data__validation": 0.5},
}


def outcome(workdir, changes):
    """Accuracies and parameters of a run in `workdir`."""
    study = runner.Experiment(tiny.study(**changes), workdir)
    summary = study.run()
    model = list(running.artifacts(study).values())[-1]
    return summary.test_accuracy, trees.digest(model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, mine and others', once they are asked for: folder, outcome."""

    class Runs(dict):
        def __missing__(self, name):
            workdir = tmp_path_factory.mktemp(name)
            self[name] = workdir, outcome(workdir, ({"mine": MINE} | OTHERS)[name])
            return self[name]

    return Runs()


def stage_folder(workdir, stage="init"):
    (folder,) = (workdir / "stages" / stage).iterdir()
    return folder


def put(source, target, what):
    """Put files of another run's stage where mine are."""
    for name in what:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy(source / name, target / name)


@pytest.mark.parametrize(
    "what", [("done.json",), ("artifacts",), ("done.json", "artifacts")]
)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_a_stage_of_another_study_runs_again(runs, tmp_path, caplog, name, what):
    workdir, expected = runs["mine"]
    shutil.copytree(workdir, tmp_path / "run")
    put(stage_folder(runs[name][0]), stage_folder(tmp_path / "run"), what)
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert outcome(tmp_path / "run", MINE) == expected
    assert "stage init runs again" in caplog.text
    if "done.json" in what:
        assert "belongs to another study" in caplog.text


@pytest.mark.slow
def test_reused_only_if_it_says_so_itself(runs, tmp_path, caplog):
    """The same in a directory to reuse from, which is left as it is."""
    workdir, expected = runs["mine"]
    shutil.copytree(workdir, tmp_path / "run")
    folder = stage_folder(tmp_path / "run")
    put(stage_folder(runs["rate"][0]), folder, ("done.json", "artifacts"))
    study = runner.Experiment(
        tiny.study(**MINE), tmp_path / "new", reuse_from=[tmp_path / "run"]
    )
    with caplog.at_level(logging.INFO, "mosaic_jax"):
        assert study.run().test_accuracy == expected[0]
    assert "belongs to another study" in caplog.text
    assert "init: running" in caplog.text
    assert (folder / "done.json").exists()


@pytest.mark.slow
def test_artifacts_of_two_stages_swapped(runs, tmp_path, caplog):
    workdir, expected = runs["mine"]
    shutil.copytree(workdir, tmp_path / "run")
    one, other = (stage_folder(tmp_path / "run", s) for s in ("init", "warmup"))
    (one / "artifacts").rename(tmp_path / "kept")
    (other / "artifacts").rename(one / "artifacts")
    (tmp_path / "kept").rename(other / "artifacts")
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert outcome(tmp_path / "run", MINE) == expected
    assert "stage init runs again" in caplog.text
    assert "stage warmup runs again" in caplog.text


@pytest.mark.slow
def test_a_checkpoint_of_another_study(runs, tmp_path, caplog):
    for name in ("mine", "rate"):
        changes = MINE if name == "mine" else OTHERS[name]
        study = runner.Experiment(tiny.study(**changes), tmp_path / name)
        running.stop_after(study, 2)
    mine, theirs = (stage_folder(tmp_path / name) for name in ("mine", "rate"))
    put(theirs, mine, ("checkpoints",))
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert outcome(tmp_path / "mine", MINE) == runs["mine"][1]
    assert "belongs to another study: its fingerprint is" in caplog.text


def test_checkpoints_tell_whose_they_are(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, {"stage": "init", "seed": 3})
    saved.save(1, {"x": jnp.ones(2)})
    assert saved.latest()[0] == 1
    same = checkpoint.Checkpoints(tmp_path, {"stage": "init", "seed": 3})
    assert same.latest()[0] == 1
    assert (
        checkpoint.Checkpoints(tmp_path, {"stage": "init", "seed": 4}).latest() is None
    )


def test_a_report_does_not_take_another_stage_for_its_own(runs, tmp_path):
    shutil.copytree(runs["mine"][0], tmp_path / "run")
    put(stage_folder(runs["rate"][0]), stage_folder(tmp_path / "run"), ("done.json",))
    with pytest.raises(errors.DataError, match="belongs to another study"):
        readers.read(tmp_path / "run")
    assert files.read_json(tmp_path / "run" / "summary.json")
