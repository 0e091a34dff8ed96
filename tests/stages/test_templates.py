"""Every stage of every chain: its template is what it provides, its numbers add up."""

import json

import numpy as np
import pytest

from mosaic_jax.run import rehearsal, variants
from mosaic_jax.run.runner import Experiment
from mosaic_jax.stages import sections
from tests import running, tiny

SHORT = {
    "data__num_clients": 2,
    "init__rounds": 1,
    "warmup__rounds": 1,
    "finetune__rounds": 1,
    "evaluation__every": 1,
    "local__steps": 1,
    "generators__steps": 2,
    "experts__local_steps": 1,
    "prototypes__iterations": 1,
    "prototypes__clusters": 2,
    "meta__steps": 2,
    "distill__steps": 2,
    "methods__fedftg__batch_size": 4,
    "methods__fedftg__width": 2,
    "methods__fedftg__iterations": 1,
}
COMPAT = {
    "audit__images": 4,
    "audit__reference_steps": 2,
    "compat__generators_first": True,
    "compat__fresh_classifier": True,
    "compat__classifier_epochs": 1,
    "compat__classifier_batch_norm": "train",
    "compat__diversity_target": "uniform",
    "compat__value_range": "normalised",
    "compat__ema_debiased": False,
    "generators__inversion_weight": 0.0,
    "generators__diversity_weight": 5.0,
    "prototypes__space": "global",
    "prototypes__gathered": "every_round",
    "generators__augment": True,
    "data__augmentation": "crop_flip",
    "meta__head": "transformer",
    "distill__divergence": "logit_mean",
}
PAPER = {
    name.replace(".", "__"): value for name, value in variants.FIELDS["paper"].items()
}
CHAINS = {
    "published": COMPAT,
    # A client of 40 images is below tau, one of more is not.
    "paper": PAPER | {"audit__images": 0, "generators__collapse_below": 0.0},
    "server": {"method": "federated", "server__method": "fedftg"},
}
# Stages whose work on the server is counted in other stages, or in none: prototypes are
# gathered by warm-up in the published form.
WITHOUT_LOOP = {"meta": ("once", "every_round"), "prototypes": ("every_round",)}


# Mosaic's own chain is looked at in tests/end_to_end/test_study.py.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in CHAINS],
)
def finished(request, tmp_path_factory):
    work = Experiment(
        tiny.study(**SHORT | CHAINS[request.param]),
        tmp_path_factory.mktemp(request.param),
    )
    return work, work.run()


def test_templates_are_what_stages_provide(finished):
    """Of the other chains, where studies of them run: tests/end_to_end."""
    running.check_templates(finished[0])


def test_a_second_start_computes_nothing(finished, caplog):
    work, summary = finished
    again = Experiment(work.settings, work.workdir)
    with caplog.at_level("INFO", "mosaic_jax"):
        assert again.run() == summary
    assert "running" not in caplog.text


def test_it_is_counted_from_its_shapes(finished):
    """Bytes sent are those of the run; how many prototypes there are is assumed."""
    work, _ = finished
    records = {stage.name: stage.record for stage in work.finished()}
    for rehearsed in rehearsal.rehearse(work.study, rehearsal.Counting()):
        found, record = rehearsed.outcome, records[rehearsed.link.name]
        for told, sent in ((found.up, record.up), (found.down, record.down)):
            assert told.keys() == sent.keys()
            for name, count in sent.items():
                few, many = (0.5, 2) if "prototypes" in name else (1, 1)
                if name != "gate_features":  # one for each prototype
                    assert few * count <= told[name] <= many * count, name


def test_what_stages_tell_is_what_the_summary_has(finished):
    work, summary = finished
    records = {stage.name: stage.record for stage in work.finished()}
    assert list(summary.flops) == list(records)
    gathered = work.settings.prototypes.gathered
    for name, record in records.items():
        counted = gathered not in WITHOUT_LOOP.get(name, ())
        assert record.flops == summary.flops[name] and (record.flops > 0 or not counted)
        assert summary.stages[name] == record.identity["fingerprint"]
        for number in record.headline.values():
            assert {"mean", "low", "high", "meaning"} <= number.keys()
        if record.section:
            assert sections.from_json(record.section).title
        assert set(record.sent_before) <= {*record.up, *record.down}
        json.dumps(record.results)
    for way in ("up", "down"):
        sent = sum(sum(getattr(record, way).values()) for record in records.values())
        assert sum(summary.communication_bytes[way].values()) == sent
    study = work.settings
    reads = study.method == "mosaic" or study.trains_once or study.exchanges_prototypes
    assert ("label_counts" in summary.communication_bytes["up"]) == reads
    final = [r.models["final"] for r in records.values() if "final" in r.models][-1]
    assert summary.test_accuracy["final"] == final["test_accuracy"]
    assert len(final["predictions"]) == len(work.data.held_out["test"].label)
    assert np.isfinite(list(summary.test_accuracy.values())).all()
