"""The random streams are those of earlier versions."""

import json

import pytest

from configs import digits_mosaic
from mosaic_jax.data import federated
from mosaic_jax.run import runner, settings

# A change of these changes every published number: raise run.study.FORMAT with it.
SPLIT = "d6522e44d337267ef7ebdf8798cac1ef85f3a267029dd80696b31611879ea902"
FIRST_LOSS = 0.38281


def demo():
    config = digits_mosaic.get_config()
    for name, value in {
        "method": "federated",
        "init.rounds": 1,
        "warmup.rounds": 0,
        "finetune.rounds": 0,
        "evaluation.every": 1,
        "log.trackers": (),
        "compute.devices": 1,
    }.items():
        config.update_from_flattened_dict({name: value})
    return settings.from_mapping(config.to_dict())


def test_the_demo_has_its_split():
    study = demo()
    assert federated.load(study.data, study.seed).sha256 == SPLIT


@pytest.mark.slow
def test_the_demo_has_its_first_loss(tmp_path):
    runner.Experiment(demo(), tmp_path).run()
    (record,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["loss"] == pytest.approx(FIRST_LOSS, rel=1e-3)
