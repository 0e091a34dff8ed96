"""The last rounds: what keeps clients near the distilled model, when it is kept."""

import dataclasses
import functools
import logging
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, trees
from mosaic_jax.run import runner, study
from mosaic_jax.run import summary as summaries
from mosaic_jax.run.store import FinishedStage
from mosaic_jax.stages.base import Outcome
from tests import running, tiny

FIELDS = {
    "init__rounds": 3,
    "finetune__rounds": 2,
    "local__steps": 30,
    "local__learning_rate": 0.2,
    "finetune__max_drop": 1.0,
}
# A rate that leaves nothing of what a model knew.
BAD = {"finetune__learning_rate": 3.0, "finetune__max_drop": 0.01}


def experiment(**changes):
    """One whose stages are driven by hand, so that nothing is written."""
    return runner.Experiment(tiny.study(**FIELDS | changes), "not-written")


@functools.cache
def first_rounds(**changes):
    """What the first rounds made, and a student: their model."""
    artifacts = {}
    init = running.outcome(experiment(**changes), "init", artifacts)
    return init, artifacts | {"student": artifacts["global_model"]}


def made(**changes):
    """An experiment, and `first_rounds` of it."""
    own = {k: v for k, v in changes.items() if not k.startswith("finetune__")}
    init, artifacts = first_rounds(**own)
    return experiment(**changes), init, dict(artifacts)


def finetuned(change=lambda data: data, **changes):
    """Outcomes of the first and last rounds, and what the latter started from.

    The last rounds see the data that `change` returns.
    """
    work, init, artifacts = made(**changes)
    link = running.link_of(work, "finetune")
    context = work.placement.context(link)
    needed = {name: artifacts[name] for name in link.needs(work.settings)}
    context = dataclasses.replace(context, data=change(context.data))
    return init, running.drive(link.run(context, needed)), artifacts


def digest(found):
    return trees.digest(jax.device_get(found.artifacts["final_model"]))


def distance(found, artifacts):
    moved = jax.tree.map(
        lambda new, old: jnp.sum((new - old) ** 2),
        found.artifacts["final_model"].params,
        artifacts["student"].params,
    )
    return float(trees.total(moved))


@pytest.mark.parametrize("kind", ["proximal", "distilled"])
@pytest.mark.slow
def test_weight_0_is_no_anchor_and_more_holds_clients(kind):
    far = {"finetune__learning_rate": 0.05}
    _, free, artifacts = finetuned(**far)
    zero = far | {"finetune__anchor": kind, "finetune__anchor_weight": 0.0}
    _, none, _ = finetuned(**zero)
    assert digest(none) == digest(free)
    held = zero | {"finetune__anchor_weight": 5.0}
    _, near, _ = finetuned(**held)
    assert digest(near) != digest(free)
    if kind == "proximal":
        assert distance(near, artifacts) < 0.9 * distance(free, artifacts)


@pytest.mark.slow
def test_rounds_that_ruin_the_model_are_undone(caplog):
    init, found, artifacts = finetuned(**BAD)
    assert digest(found) == trees.digest(jax.device_get(artifacts["student"]))
    told = found.results["last_rounds"]
    assert told["undone"]
    assert told["before"] == init.models["final"]["validation_accuracy"] > 0.5
    assert told["after"] < told["before"] - 0.2
    assert set(found.models) == {"final"}
    assert found.models["final"] == init.models["final"]
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "the final model is the distilled one" in line
    assert line == f"finetune: {found.section.blocks[0].text}".removesuffix(".")
    # What was sent stays sent.
    size = trees.num_bytes(artifacts["student"])
    assert found.up["models"] == found.down["models"] == 2 * 3 * size


def test_a_tolerated_drop_is_not_undone(caplog):
    tolerant = BAD | {"finetune__max_drop": 1.0}
    _, found, artifacts = finetuned(**tolerant)
    assert not found.results["last_rounds"]["undone"]
    assert distance(found, artifacts) > 0
    after = found.models["final"]["validation_accuracy"]
    assert found.results["last_rounds"]["after"] == after
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_a_drop_of_just_what_is_allowed_is_not_undone(drop, monkeypatch):
    work, _, artifacts = made(finetune__max_drop=drop)
    stage = running.link_of(work, "finetune").stage
    context = work.placement.context(running.link_of(work, "finetune"))
    monkeypatch.setattr(
        "mosaic_jax.stages.finetune.assess",
        lambda *_: {"validation_accuracy": 0.3 + drop},
    )
    student, state = artifacts["student"], artifacts["round_state"]
    found = []
    for after in (0.3, 0.299):
        done = Outcome({}, models={"final": {"validation_accuracy": after}})
        done = stage._checked(context, done, student, state)
        found.append(done.results["last_rounds"]["undone"])
    assert found == [False, True]


def test_test_images_have_no_say():
    """Be their labels such that the ruined model is as good as any."""

    def no_model_is_right(data):
        test = data.held_out["test"]
        wrong = dataclasses.replace(test, label=np.full_like(test.label, -1))
        return dataclasses.replace(data, held_out=data.held_out | {"test": wrong})

    _, one, _ = finetuned(**BAD)
    _, other, _ = finetuned(no_model_is_right, **BAD)
    assert other.models["final"]["test_accuracy"] == 0
    assert other.results["last_rounds"] == one.results["last_rounds"]
    assert digest(other) == digest(one)


@pytest.mark.slow
def test_without_validation_images_nothing_is_checked(caplog):
    with caplog.at_level("INFO", "mosaic_jax"):
        _, found, artifacts = finetuned(**BAD | {"data__validation": 0.0})
    assert distance(found, artifacts) > 0
    assert "last_rounds" not in found.results
    assert sum("nothing is checked" in r.message for r in caplog.records) == 1


@pytest.mark.slow
def test_studies_without_a_student_are_not_checked(caplog):
    changes = BAD | {"method": "federated", "warmup__rounds": 0}
    with caplog.at_level("INFO", "mosaic_jax"):
        _, found, artifacts = finetuned(**changes)
    assert distance(found, artifacts) > 0
    assert "last_rounds" not in found.results
    assert "checked" not in caplog.text


@pytest.mark.parametrize(
    "where", ["device", pytest.param("host", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_clients_own_models_are_those_from_before_undone_rounds(where):
    """With the batch-norm that they had then, not the one of the ruined rounds."""
    changes = {"init__method": "fedbn", "compute__client_state": where}
    init, found, _ = finetuned(**BAD, **changes)
    assert found.results["last_rounds"]["undone"]
    assert found.models["personal"] == init.models["personal"]
    (after,), (before,) = found.clients.values(), init.clients.values()
    assert after == before


@pytest.mark.slow
def test_parts_of_the_network_are_those_from_before_undone_rounds():
    changes = {"init__method": "heterofl", "budgets__rates": (1.0, 0.5, 0.5)}
    init, found, artifacts = finetuned(**BAD | changes)
    assert found.results["last_rounds"]["undone"]
    assert digest(found) == trees.digest(jax.device_get(artifacts["student"]))
    assert found.results["rate_accuracy"] == init.results["rate_accuracy"]
    assert found.models["final"] == init.models["final"]


def test_the_fields_count_from_the_last_rounds_on():
    def fingerprints(**changes):
        plan = study.build(tiny.study(**FIELDS | changes)).plan()
        return {link.name: fingerprint for link, fingerprint in plan}

    plain = fingerprints()
    for name, value in (
        ("anchor", "proximal"),
        ("anchor_weight", 2.0),
        ("anchor_temperature", 3.0),
        ("max_drop", 0.5),
    ):
        other = fingerprints(**{f"finetune__{name}": value})
        assert {n for n in plain if plain[n] != other[n]} == {"finetune"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finetune__anchor": "teacher"}, "must be one of none, proximal, distilled"),
        ({"finetune__max_drop": 1.5}, "finetune.max_drop = 1.5: must be in [0, 1]"),
        ({"finetune__anchor_weight": -1.0}, "anchor_weight = -1.0: must be >= 0"),
        (
            {"finetune__anchor": "distilled", "init__method": "fedrolex"},
            "finetune.anchor = 'distilled': must be none or proximal for init.method ="
            " 'fedrolex'",
        ),
        (
            {
                "finetune__anchor": "distilled",
                "init__method": "fedper",
                "method": "federated",
                "finetune__rounds": 2,
            },
            "finetune.anchor = 'distilled': must be none or proximal for init.method ="
            " 'fedper', whose server has no model",
        ),
        (
            {
                "local__failures": 0.5,
                "prototypes__gathered": "every_round",
                "prototypes__space": "global",
                "warmup__rounds": 2,
            },
            "local.failures = 0.5: must be 0 for prototypes.gathered = 'every_round'",
        ),
        (
            {
                "finetune__anchor": "proximal",
                "init__method": "tests.wrong_parts:OwnProgram",
            },
            "finetune.anchor = 'proximal': must be none for init.method =",
        ),
        (
            {
                "finetune__anchor": "proximal",
                "init__method": "fedproto",
                "method": "federated",
                "finetune__rounds": 2,
            },
            "finetune.anchor = 'proximal': must be none for init.method = 'fedproto',"
            " whose clients do not start from one model",
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes, expected):
    with pytest.raises(errors.ConfigError) as error:
        study.build(tiny.study(**changes))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_anchor_that_is_not_used_is_not_refused():
    for changes in ({"finetune__rounds": 0}, {"finetune__anchor_weight": 0.0}):
        changes |= {"finetune__anchor": "distilled", "init__method": "fedrolex"}
        study.build(tiny.study(**changes))


def test_the_summary_says_so():
    def summary(undone):
        record = types.SimpleNamespace(
            results={"last_rounds": {"undone": undone}},
            models={},
            headline={},
            up={"models": 30, "anchor": 8} if undone else {"models": 10},
            down={},
            seconds=1.0,
            time={"compiling": 0.0},
            flops=0.0,
            peak_memory_bytes=0,
        )
        work = experiment(seed=int(undone))
        stage = FinishedStage("finetune", pathlib.Path("fingerprint"), record)
        return summaries.build(work.settings, work.data, [stage])

    found = [summary(undone) for undone in (False, True)]
    assert [one.distilled_kept for one in found] == [False, True]
    over = summaries.over_seeds(found)
    assert over.distilled_kept == [1]
    # Though a seed lacks a payload: an anchor is sent only if a client comes late.
    assert over.communication_bytes["up"] == {"models": 20, "anchor": 4}
