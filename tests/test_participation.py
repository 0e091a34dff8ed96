"""Clients that took part in some rounds only, or in none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import trees
from mosaic_jax.experiment import Experiment
from mosaic_jax.stages import rounds
from tests import tiny

FIELDS = {
    "data__num_clients": 7,
    "init__clients_per_round": 2,
    "init__rounds": 2,
    "warmup__rounds": 2,
    "experts__local_steps": 0,
}


def outcome(study, name, artifacts):
    """What stage `name` hands on; its artifacts are added to `artifacts`."""
    stage = next(stage for stage, _ in study.plan() if stage.name == name)
    run, state = study.start(stage, artifacts), None
    while True:
        try:
            steps = run.send(state)
        except StopIteration as end:
            artifacts |= end.value.artifacts
            return end.value
        # As the loop does it: arrays in host memory are the stage's to write to.
        chunk, state = (
            steps.chunk,
            jax.tree.map(
                lambda x: np.array(x) if isinstance(x, np.ndarray) else x, steps.state
            ),
        )
        if not steps.on_host:
            chunk = jax.jit(chunk)
        for first in range(0, steps.num_steps, steps.every):
            end = min(first + steps.every, steps.num_steps)
            state, _ = chunk(steps.args, state, first, end)


@pytest.fixture(scope="module", params=["device", "host"])
def studied(request, tmp_path_factory):
    fields = FIELDS | {"compute__client_state": request.param}
    study = Experiment(tiny.study(**fields), tmp_path_factory.mktemp("study"))
    artifacts = {}
    found = {"init": outcome(study, "init", artifacts), "init_artifacts": {**artifacts}}
    found["warmup"] = outcome(study, "warmup", artifacts)
    return study, artifacts, found


def context_of(study):
    """What the study's stages see."""
    stage, _ = study.plan()[0]
    return study.start(dataclasses.replace(stage, run=lambda context: context), {})


def same(a, b):
    return trees.digest(jax.device_get(a)) == trees.digest(jax.device_get(b))


def test_a_client_has_the_model_of_its_last_round(studied):
    study, artifacts, found = studied
    before, after = found["init_artifacts"]["client_models"], artifacts["client_models"]
    program = rounds.build(context_of(study), study.settings.local, keep_models=True)
    key = rounds.stream(study.settings)
    drawn = [program.participants(key, number)[0].tolist() for number in range(4)]
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
    result = outcome(other, "experts", {**artifacts})
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


def test_the_server_learns_from_those_who_trained(studied, tmp_path):
    _, artifacts, _ = studied
    fields = FIELDS | {"method": "federated", "server__method": "dense"}
    fields |= {"server__when": "once", "server__rounds": 1}
    study = Experiment(tiny.study(**fields), tmp_path)
    stage = next(stage for stage, _ in study.plan() if stage.name == "server")
    steps = study.start(stage, artifacts).send(None)
    teachers = steps.args[0]
    who = np.flatnonzero(np.asarray(artifacts["client_models"].last_round) >= 0)
    assert same(
        teachers.client_model, trees.take(artifacts["client_models"].model, who)
    )
    np.testing.assert_array_equal(teachers.label_count, study.data.label_count[who])


def test_who_never_trained_has_the_part_that_it_can_hold(tmp_path):
    fields = FIELDS | {"init__method": "heterofl", "init__rounds": 1}
    fields |= {"budgets__rates": (1.0, 0.5), "model__width": 2}
    study = Experiment(tiny.study(**fields), tmp_path)
    artifacts = {}
    found = outcome(study, "init", artifacts)
    never = [i for i in found.results["never_trained"] if i % 2]
    assert never
    whole, models = artifacts["global_model"], artifacts["client_models"].model
    for i in never:
        narrow = models.params["convs_1"]["kernel"][i]
        kept = np.zeros(narrow.shape)
        kept[..., : narrow.shape[-2] // 2, : narrow.shape[-1] // 2] = 1
        expected = whole.params["convs_1"]["kernel"] * kept
        np.testing.assert_array_equal(narrow, expected)
