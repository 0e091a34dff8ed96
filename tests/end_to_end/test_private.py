"""Private studies from settings to report."""

import json

import jax
import numpy as np
import pytest

from mosaic_jax.cli import telling
from mosaic_jax.report import page
from mosaic_jax.run import summary
from mosaic_jax.run.runner import Experiment
from tests import tiny

EPSILON = 8.0
FEDERATED = {
    "method": "federated",
    "privacy__epsilon": EPSILON,
    "model__name": "mlp",
    "init__rounds": 2,
}
MOSAIC = {
    "privacy__epsilon": EPSILON,
    "model__norm": "group",
    "generators__inversion_weight": 0.0,
    "prototypes__clusters": 1,
}


def run(workdir, **changes):
    experiment = Experiment(tiny.study(**changes), workdir)
    return experiment, experiment.run()


def check(workdir, found):
    """What every private study must have told, and must not."""
    assert summary.read(workdir / "summary.json") == found
    private = found.privacy
    assert min(private["epsilon"]) > 0.95 * EPSILON
    assert max(private["epsilon"]) <= EPSILON
    assert private["delta"] == 1e-5 and min(private["noise"]) > 0
    # All that crosses is accounted for, and nothing else.
    assert set(private["by_payload"]) == set(found.communication_bytes["up"])
    rows = [
        json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        if row["stage"] in ("init", "warmup", "generators", "experts", "finetune"):
            assert not {"loss", "discriminator_loss"} & set(row), row


def test_rounds_are_private_and_say_so(tmp_path):
    experiment, found = run(tmp_path, **FEDERATED)
    check(tmp_path, found)
    assert list(found.privacy["by_payload"]) == ["models"]
    (line,) = [
        line
        for line in telling.opening_lines([experiment], tmp_path)
        if line.startswith("private:")
    ]
    low, high = min(found.privacy["noise"]), max(found.privacy["noise"])
    assert f"noise multipliers {low:.3g} to {high:.3g}" in line
    text = page.write(tmp_path).read_text()
    assert "noise multiplier" in text and ">Privacy</h2>" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"init__method": "fedprox", "compute__client_state": "host"},
        {"server__method": "dense", "server__when": "once", "server__rounds": 2},
        {"local__stragglers": 0.5, "local__failures": 0.3, "local__epochs": 1},
        {"init__clients_per_round": 2, "local__optimizer": "adam"},
        {
            "attack__name": "sign_flip",
            "attack__share": 0.34,
            "compression__name": "eight_bits",
            "aggregation__rule": "median",
        },
    ],
    ids=["fedprox", "dense", "unreliable", "some", "attacked"],
)
def test_other_rounds_are_private(changes, tmp_path):
    _, found = run(tmp_path, **FEDERATED, **changes)
    check(tmp_path, found)


@pytest.mark.slow
def test_mosaic_is_private_and_the_same_on_several_devices(tmp_path):
    _, found = run(tmp_path / "one", **MOSAIC)
    check(tmp_path / "one", found)
    assert jax.device_count() > 1
    _, other = run(tmp_path / "two", **MOSAIC, compute__devices=2)
    assert other.privacy == found.privacy
    assert other.test_accuracy["init"] == pytest.approx(
        found.test_accuracy["init"], abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("space", ["client", "global"])
def test_mosaic_with_fresh_classifiers_and_fewer_spaces_of_prototypes(space, tmp_path):
    changes = {"compat__fresh_classifier": True, "compat__classifier_epochs": 1}
    changes |= {"generators__discriminator": "classifier"}
    changes |= {"generators__entropy_weight": 1.0, "prototypes__space": space}
    _, found = run(tmp_path, **MOSAIC, **changes)
    check(tmp_path, found)


@pytest.mark.slow
def test_clients_with_several_networks_tell_what_they_do(tmp_path):
    _, found = run(tmp_path, **MOSAIC, model__others=("resnet18",), finetune__rounds=0)
    check(tmp_path, found)
    assert np.isfinite(list(found.test_accuracy.values())).all()
