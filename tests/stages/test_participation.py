"""Clients that took part in some rounds only, or in none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import trees
from mosaic_jax.fl import holdings
from mosaic_jax.run.runner import Experiment
from mosaic_jax.stages import federation
from tests import running, tiny

FIELDS = {
    "data__num_clients": 7,
    "init__clients_per_round": 2,
    "init__rounds": 2,
    "warmup__rounds": 2,
    "experts__local_steps": 0,
}


@pytest.fixture(scope="module", params=["device", "host"])
def studied(request, tmp_path_factory):
    fields = FIELDS | {"compute__client_state": request.param}
    study = Experiment(tiny.study(**fields), tmp_path_factory.mktemp("study"))
    artifacts = {}
    found = {
        "init": running.outcome(study, "init", artifacts),
        "init_artifacts": {**artifacts},
    }
    found["warmup"] = running.outcome(study, "warmup", artifacts)
    return study, artifacts, found


def context_of(study):
    """What the study's first stage sees."""
    return study.placement.context(running.link_of(study, "init"))


def same(a, b):
    return trees.digest(jax.device_get(a)) == trees.digest(jax.device_get(b))


@pytest.mark.slow
def test_a_client_has_the_model_of_its_last_round(studied):
    study, artifacts, found = studied
    before, after = found["init_artifacts"]["client_models"], artifacts["client_models"]
    program = federation.build(
        context_of(study), study.settings.local, keep_models=True
    )
    key = federation.rounds_key(study.settings)
    drawn = [
        program.participation.participants(key, number)[0].tolist()
        for number in range(4)
    ]
    expected = [
        max([n for n, who in enumerate(drawn) if i in who], default=-1)
        for i in range(7)
    ]
    never = [i for i in range(7) if expected[i] < 0]
    assert never and {0, 1} & set(expected)
    assert np.asarray(after.last_round).tolist() == expected
    assert found["warmup"].results["never_trained"] == never
    for i in range(7):
        own = trees.take(after.model, i)
        assert same(own, artifacts["global_model"]) == (i in never)
        if 0 <= expected[i] < 2:
            assert same(own, trees.take(before.model, i))


@pytest.mark.parametrize("which", ["all", "latest"])
def test_experts_are_of_those_who_trained(studied, which, tmp_path):
    study, artifacts, _ = studied
    fields = FIELDS | {"experts__participants": which}
    other = Experiment(tiny.study(**fields), tmp_path)
    result = running.outcome(other, "experts", {**artifacts})
    last_round = np.asarray(artifacts["client_models"].last_round)
    counted = last_round >= 0 if which == "all" else last_round == last_round.max()
    assert 0 < counted.sum() < 7
    count = np.where(counted[:, None], study.data.label_count, 0)
    experts = result.artifacts["experts"]
    held = count.sum(axis=0) > 0
    assert np.asarray(experts.present).tolist() == held.tolist()
    assert result.results["absent_classes"] == np.flatnonzero(~held).tolist()
    for k in range(10):
        expected = artifacts["global_model"]
        if held[k]:
            weight = jnp.asarray(count[:, k], jnp.float32)
            expected = trees.weighted_mean(artifacts["client_models"].model, weight)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            trees.take(experts.model, k),
            expected,
        )


def test_experts_without_steps_of_their_own_take_label_counts_alone(studied, tmp_path):
    study, artifacts, _ = studied
    other = Experiment(tiny.study(**FIELDS), tmp_path)
    result = running.outcome(other, "experts", {**artifacts})
    assert (result.up, result.down) == ({"label_counts": 7 * 10 * 4}, {})
    context = context_of(study)
    test = context.data.held_out["test"]
    image = jnp.asarray(test.image) / 127.5 - 1
    logits = jax.jit(context.classifier.logits)
    accuracy = result.results["expert_class_accuracy"]
    assert np.shape(accuracy) == (10, 10)
    for k in (0, 7):
        expert = trees.take(result.artifacts["experts"].model, k)
        right = np.argmax(logits(expert, image), -1) == test.label
        expected = [right[test.label == label].mean() for label in range(10)]
        np.testing.assert_allclose(accuracy[k], expected, atol=1e-6)


def test_clients_that_specialise_all_count(studied, tmp_path):
    """With steps too small to change the parameters."""
    study, artifacts, _ = studied
    fields = FIELDS | {"experts__local_steps": 1, "local__learning_rate": 1e-12}
    other = Experiment(tiny.study(**fields), tmp_path)
    result = running.outcome(other, "experts", {**artifacts})
    before, whole = artifacts["client_models"], artifacts["global_model"]
    never = np.flatnonzero(np.asarray(before.last_round) < 0)
    assert 0 < len(never) < 7
    size = trees.num_bytes(whole)
    assert result.up == {"label_counts": 7 * 10 * 4, "specialised_models": 7 * size}
    assert result.down == {"models": len(never) * size}
    for k in range(10):
        weight = jnp.asarray(study.data.label_count[:, k], jnp.float32)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            trees.take(result.artifacts["experts"].model.params, k),
            trees.weighted_mean(before.model.params, weight),
        )


def test_the_server_learns_from_those_who_trained(studied, tmp_path):
    _, artifacts, _ = studied
    fields = FIELDS | {"method": "federated", "server__method": "dense"}
    fields |= {"server__when": "once", "server__rounds": 1}
    study = Experiment(tiny.study(**fields), tmp_path)
    steps = study.start(running.link_of(study, "server"), artifacts).send(None)
    teachers = steps.args[0]
    who = np.flatnonzero(np.asarray(artifacts["client_models"].last_round) >= 0)
    assert same(
        teachers.client_model, trees.take(artifacts["client_models"].model, who)
    )
    np.testing.assert_array_equal(teachers.label_count, study.data.label_count[who])


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Every second client holds half of the channels; two of seven have trained."""
    fields = FIELDS | {"init__method": "heterofl", "init__rounds": 1}
    fields |= {"budgets__rates": (1.0, 0.5), "model__width": 2}
    fields |= {"experts__local_steps": 1}
    study = Experiment(tiny.study(**fields), tmp_path_factory.mktemp("halves"))
    artifacts = {}
    return study, artifacts, running.outcome(study, "init", artifacts)


@pytest.mark.slow
def test_who_never_trained_has_the_part_that_it_can_hold(halves):
    _, artifacts, found = halves
    never = [i for i in found.results["never_trained"] if i % 2]
    assert never
    whole, models = artifacts["global_model"], artifacts["client_models"].model
    for i in never:
        narrow = models.params["convs_1"]["kernel"][i]
        kept = np.zeros(narrow.shape)
        kept[..., : narrow.shape[-2] // 2, : narrow.shape[-1] // 2] = 1
        expected = whole.params["convs_1"]["kernel"] * kept
        np.testing.assert_array_equal(narrow, expected)


@pytest.mark.slow
def test_experts_of_parts_of_the_network(halves, tmp_path):
    """Their bytes, of a half as of a network of half the width, and their moments."""
    study, artifacts, found = halves
    result = running.outcome(study, "experts", {**artifacts})
    narrow = Experiment(tiny.study(data__num_clients=7, model__width=1), tmp_path)
    shape = study.data.info.image_shape
    init = narrow.study.classifier.init
    whole = artifacts["global_model"]
    size = trees.num_bytes(whole)
    half = trees.num_bytes(jax.eval_shape(lambda: init(jax.random.key(0), shape)))
    never = found.results["never_trained"]
    assert 0 < len(never) < 7
    assert result.up == {
        "label_counts": 7 * 10 * 4,
        "specialised_models": 4 * size + 3 * half,
        "moments": 10 * 7 * trees.num_bytes(whole.batch_stats),
    }
    assert result.down == {
        "models": sum(half if i % 2 else size for i in never),
        "queried_models": 10 * 7 * size,
    }
    context = study.placement.context(running.link_of(study, "experts"))
    program = federation.build(context, study.settings.local)
    expert = trees.take(result.artifacts["experts"].model, 3)
    asked = jax.jit(program.recalibrate_batch_norm)(
        context.clients,
        federation.rounds_key(study.settings),
        expert,
        study.data.label_count[:, 3],
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        expert.batch_stats,
        asked.batch_stats,
    )


@pytest.mark.slow
def test_clients_own_models_are_measured_of_those_who_trained(tmp_path):
    fields = FIELDS | {"method": "federated", "init__method": "fedbn"}
    study = Experiment(tiny.study(**fields), tmp_path)
    found = running.outcome(study, "init", {})
    never = found.results["never_trained"]
    assert 0 < len(never) < 7
    column = found.clients["own model after init"]
    own = [
        float(text.removesuffix(" %")) / 100
        for client, text in column.items()
        if client not in never
    ]
    mean = found.models["personal"]["test_accuracy"]
    np.testing.assert_allclose(mean, np.mean(own), atol=1e-4)


def test_shares_are_rounded_so_that_they_sum_up():
    assert holdings.shares([10, 10, 10], 4) == [1, 2, 1]
    assert holdings.shares([1, 9], 1) == [0, 1]
    assert sum(holdings.shares([3, 5, 7, 11], 13)) == 13


@pytest.mark.slow
def test_own_models_where_no_upload_ever_arrives(tmp_path):
    """All clients are judged by the model that they were sent."""
    fields = {"init__method": "ditto", "init__rounds": 1, "local__failures": 0.99}
    study = tiny.study(
        method="federated", warmup__rounds=0, finetune__rounds=0, **fields
    )
    summary = Experiment(study, tmp_path).run()
    assert 0 <= summary.test_accuracy["personal"] <= 1
