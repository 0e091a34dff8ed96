"""Several processes, devices and seeds; traces."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors
from mosaic_jax.run import processes, runner
from tests import running, several, tiny

FIELDS = {"method": "federated", "init__rounds": 2, "evaluation__every": 1}
ROUNDS = tiny.study(**FIELDS, warmup__rounds=0, finetune__rounds=0)


def final(workdir, settings=ROUNDS):
    study = runner.Experiment(settings, workdir)
    return running.artifacts(study)["init"]["global_model"]


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    summary = runner.Experiment(ROUNDS, workdir).run()
    return workdir, summary


@pytest.mark.slow
def test_two_processes_equal_one(alone, tmp_path):
    codes, output = several.start([tmp_path / "run"] * 2, [[], []])
    assert codes == [0, 0], output
    assert re.search(r"^final +0\.\d{4} +0\.\d{4}$", output[0], re.MULTILINE)
    assert "report" not in output[1]
    close(final(tmp_path / "run"), final(alone[0]))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"].startswith("2 x")
    assert summary["test_accuracy"] == alone[1].test_accuracy


def test_four_devices_equal_one(alone, tmp_path):
    compute = dataclasses.replace(ROUNDS.compute, devices=4)
    many = dataclasses.replace(ROUNDS, compute=compute)
    runner.Experiment(many, tmp_path).run()
    close(final(tmp_path, many), final(alone[0]))


@pytest.mark.slow
def test_states_in_host_memory_equal_those_on_the_device(tmp_path):
    fields = FIELDS | {"warmup__rounds": 0, "finetune__rounds": 0}
    summaries, states = [], []
    for place in ("device", "host"):
        study = tiny.study(**fields, init__method="fedbn", compute__client_state=place)
        work = runner.Experiment(study, tmp_path / place)
        summaries.append(work.run())
        states.append(running.artifacts(work)["init"])
    close(states[0], states[1])
    assert summaries[0].test_accuracy == summaries[1].test_accuracy
    assert {"final", "personal"} <= summaries[0].test_accuracy.keys()


def test_profile_of_a_stage(tmp_path):
    runner.Experiment(dataclasses.replace(ROUNDS, profile="init"), tmp_path).run()
    assert list(tmp_path.glob("profile/init/round/**/perfetto_trace.json.gz"))
    assert list(tmp_path.glob("profile/init/round/**/*.xplane.pb"))


@pytest.mark.slow
def test_seeds(alone, tmp_path, capsys):
    fields = FIELDS | {"warmup__rounds": 0, "finetune__rounds": 0}
    config = tiny.config(**fields, seeds=2)
    assert launch.run(config.to_dict(), tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seeds"] == [0, 1]
    finals = [
        json.loads((tmp_path / f"seed_{seed}" / "summary.json").read_text())
        for seed in (0, 1)
    ]
    assert finals[0]["test_accuracy"] == alone[1].test_accuracy
    found = [one["test_accuracy"]["final"] for one in finals]
    expected = {"mean": np.mean(found), "spread": np.std(found, ddof=1)}
    assert summary["test_accuracy"]["final"] == pytest.approx(expected)
    assert f"{np.mean(found):.4f} ± " in capsys.readouterr().out


def together_equal_alone(study, workdir, tolerance):
    """The same records, and artifacts that are close, of every stage."""
    together, alone = (
        [
            runner.Experiment(
                dataclasses.replace(study, seed=seed), workdir / name / str(seed)
            )
            for seed in (0, 1)
        ]
        for name in ("together", "alone")
    )
    runner.run_together(together)
    for one, other in zip(together, alone, strict=True):
        other.run()
        for a, b in zip(one.finished(), other.finished(), strict=True):
            steps = [[r["step"] for r in stage.record.history] for stage in (a, b)]
            assert steps[0] == steps[1]
        close(running.artifacts(one), running.artifacts(other), tolerance)


# Small steps: with two channels, rounding soon decides which of them die.
SMALL_STEPS = {
    "model__norm": "group",
    "local__learning_rate": 1e-3,
    "init__rounds": 2,
    "evaluation__every": 1,
}


@pytest.mark.slow
def test_seeds_together_equal_alone(tmp_path):
    study = tiny.study(
        method="federated", warmup__rounds=0, finetune__rounds=0, **SMALL_STEPS
    )
    together_equal_alone(study, tmp_path, 1e-5)


@pytest.mark.slow
def test_seeds_together_equal_alone_in_every_stage(tmp_path):
    study = tiny.study(
        **SMALL_STEPS,
        model__width=4,
        experts__local_steps=2,
        distill__learning_rate=1e-4,
        finetune__learning_rate=1e-3,
    )
    together_equal_alone(study, tmp_path, 5e-3)


def test_seeds_together_on_several_devices(tmp_path):
    study = tiny.study(compute__devices=2, compute__seeds_at_once=2)
    with pytest.raises(errors.ConfigError, match="must be <= 1 on 2 devices"):
        runner.Experiment(study, tmp_path)


def test_one_seed_and_several_keep_apart(alone, tmp_path, capsys):
    fields = FIELDS | {"warmup__rounds": 0, "finetune__rounds": 0}
    assert launch.run(tiny.config(**fields, seeds=2).to_dict(), alone[0]) == 2
    assert "holds a study of one seed: must be" in capsys.readouterr().err
    (tmp_path / "seed_0").mkdir()
    (tmp_path / "seed_0" / "config.json").write_text("{}")
    assert launch.run(tiny.config(**fields).to_dict(), tmp_path) == 2
    assert "holds studies of several seeds: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("", 2, 0), "--coordinator = '': must be HOST:PORT for --num_processes = 2"),
        (("host:1", 2, 2), "--process_id = 2: must be in [0, 1] for --num_processes"),
    ],
)
def test_contradicting_processes(arguments, expected):
    with pytest.raises(errors.ConfigError, match=re.escape(expected)):
        processes.join(*arguments)
