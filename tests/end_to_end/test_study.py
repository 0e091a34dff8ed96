"""A tiny study of every stage on real digits, in this process."""

import itertools
import json
import re

import numpy as np
import pytest

from mosaic_jax import report
from mosaic_jax.core import errors, trees
from mosaic_jax.run import methods, runner
from mosaic_jax.run import summary as summaries
from tests import running, tiny

STAGES = [
    "init",
    "generators",
    "warmup",
    "experts",
    "prototypes",
    "meta",
    "distill",
    "finetune",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    study = runner.Experiment(tiny.study(warmup__rounds=2), workdir)
    summary = study.run()
    return study, summary, report.write(study.workdir)


def test_summary_is_complete_and_measured(finished):
    study, summary, _ = finished
    assert summary == summaries.read(study.workdir / "summary.json")
    assert list(summary.seconds) == STAGES
    assert min(summary.seconds.values()) > 0
    assert set(summary.test_accuracy) == {
        "init",
        "warmup",
        "experts_mean",
        "diagonal",
        "teacher",
        "distilled",
        "final",
    }
    assert all(0 <= value <= 1 for value in summary.test_accuracy.values())
    assert summary.rounds == 4 + 2 + 4
    assert summary.peak_memory_bytes > 1e6
    # The tiny study counts its GAN stage in steps, which nobody idles through.
    assert summary.padding_waste == {"generators": 1.0}
    counts = np.array(summary.partition["label_counts"])
    assert counts.shape == (3, 10)
    assert counts.sum() == len(study.data.clients.images.label)


@pytest.mark.slow
def test_the_same_seed_again_is_the_same_bit_for_bit(finished, tmp_path):
    first, summary, _ = finished
    again = runner.Experiment(tiny.study(warmup__rounds=2), tmp_path / "again")
    assert again.run().test_accuracy == summary.test_accuracy
    digests = [
        {name: trees.digest(made) for name, made in running.artifacts(study).items()}
        for study in (first, again)
    ]
    assert digests[0] == digests[1] and len(digests[0]) == len(first.plan())
    other = runner.Experiment(tiny.study(warmup__rounds=2, seed=1), tmp_path / "other")
    made = {}
    running.outcome(other, "init", made)
    model = running.artifacts(first)["init"]["global_model"]
    assert trees.digest(made["global_model"]) != trees.digest(model)


def test_templates_are_what_stages_provide(finished):
    running.check_templates(finished[0])


def test_communication_is_counted(finished):
    study, summary, _ = finished
    size = trees.num_bytes(running.artifacts(study)["finetune"]["final_model"])
    up = summary.communication_bytes["up"]
    assert up["models"] == 10 * 3 * size
    assert up["specialised_models"] == 3 * size
    assert up["label_counts"] == 3 * 10 * 4
    # Of what methods share, those that send none are billed for none.
    sent_by = {s.name for s in study.finished() if "label_counts" in s.record.up}
    assert sent_by == {"experts"}
    assert set(up) == {
        "models",
        "label_counts",
        "generators",
        "specialised_models",
        "prototypes",
    }
    assert summary.communication_bytes["down"]["experts"] == 3 * 10 * size


def test_report_stands_alone(finished):
    study, _, page = finished
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    names = {path.stem for path in (study.workdir / "figures").glob("*.png")}
    history = (study.workdir / "metrics.jsonl").read_text().splitlines()
    loops = [(row["stage"], row["loop"]) for row in map(json.loads, history)]
    # A single step makes no curve.
    drawn = {f"training_{s}_{loop}" for s, loop in loops if loops.count((s, loop)) > 1}
    assert "training_distill_student" in drawn
    assert names == drawn | {
        "accuracy",
        "accuracy_bytes",
        "classes",
        "communication",
        "confusion",
        "coverage",
        "experts",
        "generated",
        "label_counts",
        "per_class",
        "reliance",
        "seconds",
    }


def test_metrics_and_split_are_on_disk(finished):
    study, _, _ = finished
    lines = (study.workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r["step"] for r in records if r["stage"] == "distill"]
    assert steps == [2, 4, 6]
    split = json.loads((study.workdir / "split.json").read_text())
    assert split["sha256"] == study.data.sha256
    assert sorted(itertools.chain(*split["clients"])) == list(
        range(len(study.data.clients.images.label))
    )


def test_only_what_changed_runs_again(finished, tmp_path, caplog):
    study, _, _ = finished
    changed = tiny.study(warmup__rounds=2, distill__steps=4)
    with caplog.at_level("INFO", "mosaic_jax"):
        summary = runner.Experiment(changed, tmp_path, reuse_from=[study.workdir]).run()
    reused = [r.message.split(":")[0] for r in caplog.records if "reused" in r.message]
    ran = [r.message.split(":")[0] for r in caplog.records if "running" in r.message]
    assert reused == STAGES[:6]
    assert ran == STAGES[6:]
    assert list(summary.seconds) == STAGES
    stages = {
        json.loads(line)["stage"]
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    }
    assert {"init", "generators", "distill"} <= stages


def test_fedavg_goes_on_from_the_same_first_stage(finished, tmp_path, caplog):
    study, summary, _ = finished
    config = methods.with_method(tiny.study(warmup__rounds=2), "fedavg")
    with caplog.at_level("INFO", "mosaic_jax"):
        control = runner.Experiment(config, tmp_path, reuse_from=[study.workdir]).run()
    assert "init: reused" in caplog.text
    assert control.rounds == summary.rounds
    assert control.partition == summary.partition
    assert set(control.test_accuracy) == {"init", "warmup", "final"}


def test_damaged_artifacts_run_again(finished, tmp_path, caplog):
    study, summary, _ = finished
    config = tiny.study(warmup__rounds=2)
    copy = runner.Experiment(config, tmp_path, reuse_from=[study.workdir])
    copy.run()
    artifacts = copy.finished()[-2].directory / "artifacts"
    path = next(artifacts.rglob("d/*"))
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level("WARNING", "mosaic_jax"):
        again = runner.Experiment(config, tmp_path).run()
    assert "stage distill runs again" in caplog.text
    assert again.test_accuracy == summary.test_accuracy


@pytest.mark.parametrize(
    "changes",
    [
        {
            "generators__inversion_weight": 0.01,
            "generators__entropy_weight": 1.0,
            "generators__ema_decay": 0.9,
            "generators__translate": 1,
            "prototypes__space": "client",
            "meta__gate": "global_topk",
            "meta__gate_experts": 3,
            "meta__head": "diagonal",
            "distill__weighting": "size",
            "distill__augment": "translate",
            "distill__min_confidence": 0.1,
            "distill__batch_norm": "train",
            "finetune__rounds": 0,
        },
        {"distill__source": "validation", "distill__augment": "data"},
        {
            "refine__steps": 2,
            "distill__pool": 12,
            "distill__own_classes": True,
            "distill__balanced": True,
            "distill__focus": 1.0,
        },
    ],
    ids=["options", "upper bound", "refined pool"],
)
@pytest.mark.slow
def test_other_choices_run(finished, tmp_path, changes):
    study, _, _ = finished
    summary = runner.Experiment(
        tiny.study(warmup__rounds=2, **changes), tmp_path, reuse_from=[study.workdir]
    ).run()
    assert np.isfinite(summary.test_accuracy["final"])


@pytest.mark.slow
def test_all_generators_collapsed_is_said(finished, tmp_path):
    study, _, _ = finished
    config = tiny.study(warmup__rounds=2, generators__collapse_below=9.0)
    with pytest.raises(errors.MosaicError, match="all have collapsed"):
        runner.Experiment(config, tmp_path, reuse_from=[study.workdir]).run()
    # They stop the study where they were trained.
    assert not (tmp_path / "stages" / "meta").exists()


def test_divergence_is_an_error(tmp_path):
    config = tiny.study(local__learning_rate=1e30)
    expected = r"seed 0, init, in round 1: client 0: loss is not finite"
    with pytest.raises(errors.DivergedError, match=expected):
        runner.Experiment(config, tmp_path).run()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, r"--workdir = .*: holds another study, with seed = 0 where this"),
        ({"init__method": "fedsgd"}, "init.method = 'fedsgd': must be one of fedavg,"),
        ({"meta__gate_experts": 11}, "meta.gate_experts = 11: must be <= 10"),
    ],
)
def test_bad_studies_end_before_work(finished, changes, expected):
    study, _, _ = finished
    workdir = study.workdir
    before = (workdir / "summary.json").read_bytes()
    with pytest.raises(errors.MosaicError, match=expected):
        runner.Experiment(tiny.study(warmup__rounds=2, **changes), workdir)
    assert (workdir / "summary.json").read_bytes() == before


def test_more_clients_than_images(tmp_path):
    with pytest.raises(errors.DataError, match="data.num_clients = 432: must be <= 43"):
        runner.Experiment(tiny.study(data__num_clients=432), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_reuse_from_nowhere(tmp_path):
    with pytest.raises(errors.ConfigError, match="--reuse_from = .*: no run directory"):
        runner.Experiment(tiny.study(), tmp_path, reuse_from=[tmp_path / "no"])
