"""Whole studies of which some clients attack, and send what is compressed."""

import dataclasses

import jax
import numpy as np
import pytest

from mosaic_jax.core import trees
from mosaic_jax.fl import compression, robust, uploads
from mosaic_jax.fl.sending import Sending
from mosaic_jax.run import runner, study
from mosaic_jax.run import summary as summaries
from mosaic_jax.stages import own_models
from tests import running, tiny

FIELDS = {
    "method": "federated",
    "warmup__rounds": 0,
    "attack__name": "sign_flip",
    "attack__share": 0.34,
    "aggregation__rule": "trimmed_mean",
    "compression__name": "sign",
}
SHORT = {"init__rounds": 2, "finetune__rounds": 2, "evaluation__every": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    work = runner.Experiment(
        tiny.study(**FIELDS | SHORT), tmp_path_factory.mktemp("attacked")
    )
    return work, work.run()


def test_who_attacks_is_named(finished):
    work, summary = finished
    (hostile,) = summary.attackers
    assert summary.withstands == 1
    assert summaries.read(work.workdir / "summary.json").attackers == [hostile]
    for stage in work.finished():
        assert stage.record.clients["attacks"] == {str(hostile): "yes"}


def test_a_rule_that_is_told_of_too_few_says_so(tmp_path, caplog):
    """Where attackers are named, and before the rounds; it is legitimate."""
    fields = FIELDS | {"compression__name": "none", "attack__share": 0.67}
    work = runner.Experiment(tiny.study(**fields), tmp_path)
    told = "2 attack, the rule withstands 1"
    assert caplog.text.count(told) == 1
    rounds = work.placement.context(running.link_of(work, "init"))
    (column,) = own_models.report_columns(rounds, "init", [])
    assert column == f"attacks ({told})"


def test_a_round_of_a_few_has_few_attackers():
    fields = {"rule": robust.Median(), "withstands": 2, "num_clients": 100}
    few = Sending(num_attackers=2, clients_in_round=5, **fields)
    assert not few.outnumbered
    many = Sending(num_attackers=10, clients_in_round=5, **fields)
    assert many.outnumbered == (
        "10 attack, up to 5 of the 5 of a round, the rule withstands 2"
    )


@pytest.mark.parametrize(
    ("rule", "share", "withstands", "outnumbered"),
    [
        ("mean", 0.67, 3, False),
        ("trimmed_mean", 0.34, 1, False),
        ("trimmed_mean", 0.67, 1, True),
        # Whatever it is told.
        ("median", 0.34, 1, False),
        ("median", 0.67, 1, True),
    ],
)
def test_what_rules_withstand(rule, share, withstands, outnumbered):
    fields = FIELDS | {"compression__name": "none", "aggregation__rule": rule}
    told = 0 if rule == "median" else 1
    fields |= {"attack__share": share, "aggregation__attackers": told}
    sending = study.build(tiny.study(**fields)).sending
    assert sending.withstands == withstands
    assert bool(sending.outnumbered) == outnumbered


def test_what_is_left_out_goes_on_from_stage_to_stage(finished):
    """And is saved in the shapes that stages tell."""
    work, _ = finished
    running.check_templates(work)
    error = running.artifacts(work)["init"]["round_state"]["error"]
    assert all(np.abs(leaf).max() > 0 for leaf in error)


def test_bytes_of_the_study_are_those_of_the_arrays(finished):
    """Four rounds of three clients; moments of batch-norm are sent as they are."""
    work, summary = finished
    model = running.artifacts(work)["init"]["global_model"]
    update = uploads.with_parameters(model, uploads.parameters(model))
    key = jax.random.key(0)
    message = compression.encode(work.study.sending.compressor, update, key)
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(message))
    assert summary.communication_bytes["up"]["models"] == 4 * 3 * size
    down = summary.communication_bytes["down"]["models"]
    assert down == 4 * 3 * trees.num_bytes(model) > 5 * 4 * 3 * size


def fingerprints(**changes):
    fields = {"attack__share": 0.34, "warmup__rounds": 2} | changes
    plan = study.build(tiny.study(**fields)).plan()
    return {link.name: fingerprint for link, fingerprint in plan}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"attack__share": 0.7}, True),  # of an attack that is none
        ({"aggregation__attackers": 0}, True),
        ({"attack__name": "sign_flip"}, False),
        ({"attack__name": "label_flip"}, False),
        ({"aggregation__rule": "median"}, False),
        ({"compression__name": "eight_bits"}, False),
    ],
)
def test_stages_are_remembered_by_what_changes_them(changes, same):
    before, after = fingerprints(), fingerprints(**changes)
    assert all((before[name] == after[name]) == same for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sign_flip", "alie", "label_flip"])
def test_mosaic_is_attacked_too(name, tmp_path):
    """Its experts are of what attackers send, after steps of their own as well."""
    share = 0.67 if name == "alie" else 0.34  # whose attackers need each other
    fields = {"attack__name": name, "attack__share": share, "warmup__rounds": 1}
    work = runner.Experiment(tiny.study(**fields), tmp_path)
    summary = work.run()
    running.check_templates(work)
    assert len(summary.attackers) == 1 + (name == "alie")
    hostile = summary.attackers[0]
    clean = runner.Experiment(tiny.study(warmup__rounds=1), tmp_path / "clean")
    clean.run()
    found, expected = (running.artifacts(one) for one in (work, clean))
    for stage, artifact in (("init", "client_models"), ("experts", "experts")):
        assert not tiny.are_close(found[stage][artifact], expected[stage][artifact])
    held = np.array(summary.partition["label_counts"])[hostile]
    true = np.array(clean.data.label_count)[hostile]
    flipped = name == "label_flip"
    np.testing.assert_array_equal(held, true[::-1] if flipped else true)


@pytest.mark.slow
def test_seeds_at_once_have_each_its_attackers(tmp_path):
    """As one by one, who draw others."""
    fields = FIELDS | SHORT | {"data__num_clients": 6, "seeds": 2}
    found = []
    for at_once in (1, 2):
        config = tiny.study(compute__seeds_at_once=at_once, **fields)
        works = [
            runner.Experiment(
                dataclasses.replace(config, seed=seed, seeds=1),
                tmp_path / f"{at_once}_{seed}",
            )
            for seed in (0, 1)
        ]
        summaries_of = (
            runner.run_together(works) if at_once > 1 else [w.run() for w in works]
        )
        assert summaries_of[0].attackers != summaries_of[1].attackers
        found.append([running.artifacts(w)["init"]["global_model"] for w in works])
    tiny.close(found[1], found[0], rtol=1e-3)
