"""FLOPs by hand, and a dry run that promises what a study then costs."""

import dataclasses
import json

import jax
import pytest

from mosaic_jax import server
from mosaic_jax.cli import launch
from mosaic_jax.fl import gan
from mosaic_jax.run import estimate, forecast, runner
from tests import tiny


def test_federated_rounds_by_hand(tmp_path):
    study = runner.Experiment(
        tiny.study(method="federated", warmup__rounds=0), tmp_path
    )
    forward = study.study.classifier.flops(study.data.info.image_shape)
    held_out = sum(len(images.label) for images in study.data.held_out.values())
    # 4 rounds of 3 clients, 2 steps of 16 images; evaluated twice, and at the end.
    trained = 4 * 3 * 2 * 16 * 3 * forward
    assert study.study.flops == {"init": trained + 3 * held_out * forward}


@pytest.mark.parametrize("name", server.METHODS)
@pytest.mark.slow
def test_training_on_the_server_grows_with_what_it_does(tmp_path, name):
    changes = {"method": "federated", "server__method": name}
    changes["server__when"] = server.METHODS[name].when
    study = runner.Experiment(tiny.study(**changes), tmp_path)

    task = dataclasses.replace(
        study.study.task,
        gan=gan.build(study.settings, study.data.info, study.study.classifier),
    )

    def total(teachers, rounds):
        return study.study.server.flops(task, teachers, rounds)

    assert total(3, 0) == 0
    assert 0 < total(3, 1) < total(3, 4) < total(6, 4)
    assert total(3, 4) >= 4 * total(3, 1)


def test_every_stage_of_mosaic_costs_something(tmp_path):
    study = runner.Experiment(tiny.study(audit__images=8), tmp_path)
    assert list(study.study.flops) == [stage.name for stage, _ in study.plan()]
    assert min(study.study.flops.values()) > 0
    few = runner.Experiment(tiny.study(generators__steps=3), tmp_path / "few")
    assert study.study.flops["generators"] == pytest.approx(
        2 * few.study.flops["generators"]
    )


def test_smaller_clients_cost_less(tmp_path):
    fields = {"method": "federated", "init__method": "heterofl", "model__width": 8}
    fields |= {"init__rounds": 400, "evaluation__every": 400}
    small = runner.Experiment(
        tiny.study(**fields, budgets__rates=(0.5,)), tmp_path / "small"
    )
    large = runner.Experiment(
        tiny.study(**fields, budgets__rates=(1.0,)), tmp_path / "large"
    )
    assert small.study.flops["init"] < 0.5 * large.study.flops["init"]


@pytest.mark.parametrize(
    "how", ["count", pytest.param("measure", marks=pytest.mark.slow)]
)
def test_a_dry_run_tells_and_leaves_nothing(how, tmp_path, capsys):
    fields = {"method": "federated", "init__rounds": 2, "warmup__rounds": 2}
    config = tiny.config(**fields).to_dict()
    assert launch.run(config, tmp_path / "dry", dry_run=how) == 0
    output = capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    study = runner.Experiment(tiny.study(**fields), tmp_path / "run")
    assert len(study.plan()) == 2
    for stage, _ in study.plan():
        assert f"\n{stage.name} " in f"\n{output}"
    shape = study.data.info.image_shape
    model = study.study.classifier.init(jax.random.key(0), shape)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"parameters of the classifier: {parameters}" in output
    says = {"count": "not known for this machine", "measure": "peak memory: "}
    assert says[how] in output


@pytest.mark.slow
def test_what_is_promised_is_what_is_sent(tmp_path):
    fields = {"audit__images": 8, "audit__reference_steps": 4}
    study = runner.Experiment(tiny.study(**fields), tmp_path / "run")
    costs = {cost.stage: cost for cost in estimate.estimate(study)}
    counted = {one.stage: one for one in forecast.forecast(study.study, None)}
    study.run()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        sum(c.up.get("models", 0) for c in costs.values())
        == (summary["communication_bytes"]["up"]["models"])
    )
    assert costs["generators"].up == {
        "generators": summary["communication_bytes"]["up"]["generators"]
    }
    assert summary["flops"] == {name: cost.flops for name, cost in costs.items()}
    assert all(cost.seconds > 0 for cost in costs.values())
    assert counted.keys() == costs.keys()
    for name, cost in costs.items():
        one = counted[name]
        assert (one.flops, one.seconds) == (cost.flops, None)
        assert one.up == sum(cost.up.values())
        assert one.down == sum(cost.down.values())
