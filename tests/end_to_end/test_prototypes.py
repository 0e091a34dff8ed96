"""FedProto and FedTGP among clients with unlike networks, end to end."""

import json

import jax
import numpy as np
import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors, prng, trees
from mosaic_jax.run import forecast, methods
from mosaic_jax.run import study as studies
from mosaic_jax.run.runner import Experiment
from tests import running, tiny

METHODS = ("fedproto", "fedtgp_decay")
# Clients 0 and 2 have a plain CNN, client 1 a ResNet-18.
FIELDS = {
    "model__name": "cnn",
    "model__others": ("resnet18",),
    "model__width": 1,
    "init__rounds": 2,
    "warmup__rounds": 1,
    "finetune__rounds": 1,
    "evaluation__every": 1,
    "methods__fedtgp__epochs": 2,
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prototypes")
    config = tiny.config(compare=",".join(METHODS), **FIELDS).to_dict()
    assert launch.run(config, workdir) == 0
    return workdir, json.loads((workdir / "comparison.json").read_text())


def experiment(workdir, name="fedtgp_decay", **changes):
    study = methods.with_method(tiny.study(**FIELDS | changes), name)
    return Experiment(study, workdir)


@pytest.mark.slow
def test_a_comparison_has_the_clients_own_models(compared):
    workdir, found = compared
    for name in METHODS:
        row = found["methods"][name]
        summary = json.loads((workdir / name / "summary.json").read_text())
        assert set(summary["test_accuracy"]) == {"personal", "nearest_prototype"}
        assert set(summary["validation_accuracy"]) == set(summary["test_accuracy"])
        for model, value in summary["test_accuracy"].items():
            assert row[f"{model}_test_accuracy"]["mean"] == value
        assert summary["rounds"] == 4
        page = (workdir / name / "report.html").read_text()
        assert "test accuracy of the clients&#x27; own models" in page
    assert found["methods"]["fedproto"]["server"] == "none"
    assert found["methods"]["fedtgp_decay"]["server"] == "every round, prototypes"
    page = (workdir / "comparison.html").read_text()
    assert "by nearest prototype, %" in page
    for name in METHODS:  # no model of the server's is judged
        assert "test_accuracy" not in found["methods"][name]


@pytest.mark.slow
def test_bytes_are_those_of_prototypes(compared):
    workdir, found = compared
    split = json.loads((workdir / "fedproto" / "split.json").read_text())
    held = np.count_nonzero(split["label_counts"])
    for row in found["methods"].values():
        # Four rounds; eight features of either network, and the number of the class.
        assert row["bytes_up"] == {
            "prototypes": 4 * held * 4 * (8 + 1),
            "label_counts": 3 * 10 * 4,
        }
        assert row["bytes_down"] == {"prototypes": 4 * 3 * 10 * (4 * 8 + 1)}


@pytest.mark.slow
def test_templates_and_what_is_kept(compared):
    workdir, _ = compared
    for name in METHODS:
        work = experiment(workdir / name, name)
        running.check_templates(work)
        made = running.artifacts(work)
        last = "finetune" if name.endswith("decay") else "warmup"
        assert list(made)[-1] == last
        state = made[last]["prototype_state"]
        assert np.all(np.asarray(state.last_round) == 3)
        assert [len(own.mean) for own in state.client] == [2, 1]


@pytest.mark.slow
def test_networks_start_as_those_of_federations_of_their_own(compared):
    """So that Mosaic may be compared: its first stage records the same."""
    workdir, found = compared
    mosaic = experiment(workdir / "mosaic", "mosaic")
    classifier = mosaic.study.classifier
    context = mosaic.placement.context(running.link_of(mosaic, "init"))
    model = classifier.init(
        prng.named(context.key, "model"), mosaic.data.info.image_shape
    )
    digest = trees.digest(jax.device_get(model))
    assert found["equal_terms"]["0"]["initial_params_sha256"] == digest


@pytest.mark.slow
def test_a_broken_off_run_ends_the_same(compared, tmp_path):
    workdir, _ = compared
    work = experiment(tmp_path)
    running.stop_after(work, 2)
    again = experiment(tmp_path)
    again.run()
    found, expected = (
        running.artifacts(one)["finetune"]["prototype_state"]
        for one in (again, experiment(workdir / "fedtgp_decay"))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_models_in_host_memory_are_the_same(compared, tmp_path):
    workdir, _ = compared
    work = experiment(tmp_path, compute__client_state="host")
    work.run()
    found, expected = (
        running.artifacts(one)["finetune"]["prototype_state"]
        for one in (work, experiment(workdir / "fedtgp_decay"))
    )
    tiny.close(found, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_dry_run_tells_what_it_costs(compared, where):
    workdir, _ = compared
    study = experiment(workdir / "x", compute__client_state=where).study
    stages = forecast.forecast(studies.build(study.settings, study.data), None)
    assert [one.stage for one in stages] == ["init", "warmup", "finetune"]
    # Two steps in each round of each of two CNNs and the ResNet.
    # A loop whose states lie in host memory is not told by its steps.
    assert (stages[0].steps > 0) == (where == "device")
    summary = json.loads((workdir / "fedtgp_decay" / "summary.json").read_text())
    sent = sum(summary["communication_bytes"]["up"].values())
    assert sum(one.up for one in stages) == sent
    assert all(one.flops > 0 for one in stages)


def test_some_clients_of_each_network_take_part():
    fields = FIELDS | {"method": "federated", "init__method": "fedproto"}
    tiny.study(**fields | {"init__clients_per_round": 2})
    with pytest.raises(errors.ConfigError, match="must be 0 where clients have diff"):
        tiny.study(**FIELDS | {"init__clients_per_round": 2})
    with pytest.raises(errors.ConfigError, match="= 'fedavg' averages models"):
        tiny.study(**fields | {"init__method": "fedavg"})
