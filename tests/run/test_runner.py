"""What several processes of one study must have alike."""

import json

import pytest

from mosaic_jax.run import runner
from mosaic_jax.run.runner import Experiment
from tests import tiny


def facts(workdir, reuse_from=(), **changes):
    study = tiny.study(**tiny.SHORT | changes)
    return runner.facts([Experiment(study, workdir, reuse_from=reuse_from)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("local.learning_rate", 0.5),
        ("seed", 7),
        ("init.rounds", 3),
        ("log.every_steps", 3),
        ("data.num_clients", 2),
    ],
)
def test_processes_compare_every_setting(tmp_path, field, value):
    mine = facts(tmp_path)["settings"]
    theirs = facts(tmp_path, **{field.replace(".", "__"): value})["settings"]
    assert {n for n in mine if mine[n] != theirs[n]} == {field}
    assert theirs[field] == value


def test_images_may_lie_elsewhere(tmp_path):
    here, there = facts(tmp_path), facts(tmp_path, data__dir=str(tmp_path))
    assert here == there
    assert json.dumps(here)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    Experiment(tiny.study(**tiny.SHORT), workdir).run()
    return workdir


def test_processes_compare_what_they_find(finished, tmp_path):
    fresh = facts(tmp_path)
    resumed = facts(finished)
    reusing = facts(tmp_path, reuse_from=[finished])
    for other in (resumed, reusing):
        assert {name for name in fresh if fresh[name] != other[name]} == {"run"}
    assert resumed["run"]["finished stages of the study"] == ["init"]
    assert reusing["run"]["finished stages of the study"] == []
