"""Prototypes that clients send in every round of warm-up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.fl import prototypes, training
from mosaic_jax.run import runner
from mosaic_jax.stages import federation, gathering
from tests import running, tiny

pytestmark = pytest.mark.slow

FIELDS = {
    "prototypes__space": "global",
    "prototypes__gathered": "every_round",
    "data__augmentation": "crop_flip",
    "init__rounds": 2,
    "warmup__rounds": 3,
    "local__batch_size": 24,
}
CLUSTERS, ITERATIONS = 3, 20


def warmed_up(folder, **changes):
    """A study after its warm-up: the study, artifacts before and after, the outcome."""
    work = runner.Experiment(tiny.study(**FIELDS | changes), folder)
    before = {}
    running.outcome(work, "init", before)
    after = dict(before)
    found = running.outcome(work, "warmup", after)
    return work, before, after, found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return warmed_up(tmp_path_factory.mktemp("plain"))


def rounds_of(work):
    """The program of the study's rounds, with clients on one device."""
    study = work.settings
    return tiny.rounds(
        work.placement.axis,
        network=work.study.classifier,
        local=study.local,
        augmentation="crop_flip",
        clients_per_round=study.init.clients_per_round,
    )


def by_hand(work, key, model, number):
    """(label, client, feature) of what is sent in a round, one client at a time."""
    study, classifier = work.settings, work.study.classifier
    steps, data = study.local.steps, work.data.clients
    features = jax.jit(classifier.features)
    for i in range(data.num_clients):
        client = trees.take(data.client, i)
        batch_at = training.client_batches(
            client,
            data.images,
            number * steps,
            steps,
            key=key,
            batch_size=study.local.batch_size,
            augmentation="crop_flip",
        )
        batches = [batch_at(j) for j in range(steps)]
        feature = np.concatenate([features(model, b.image)[b.mask] for b in batches])
        label = np.concatenate([b.label[b.mask] for b in batches])
        assert len(label) <= steps * study.local.batch_size
        of_round = prng.at(prng.named(key, "prototypes"), number, client.number)
        for k in range(10):
            rows = feature[label == k]
            if 0 < len(rows) < CLUSTERS:
                yield k, i, rows.mean(0)
            elif len(rows):
                member, _ = prototypes.kmeans(
                    prng.at(of_round, k),
                    jnp.asarray(rows),
                    jnp.ones(len(rows), bool),
                    num_clusters=CLUSTERS,
                    num_steps=ITERATIONS,
                )
                for j in range(CLUSTERS):
                    if (member == j).any():
                        yield k, i, rows[member == j].mean(0)


@pytest.mark.slow
def test_they_are_those_of_a_plain_loop_over_the_rounds(plain, monkeypatch):
    """Farthest rows seed k-means here: a draw depends on the padding of its rows."""
    monkeypatch.setattr(jax.random, "categorical", lambda _, log_p: jnp.argmax(log_p))
    work, before, _, _ = plain
    after = dict(before)
    found = running.outcome(work, "warmup", after).artifacts["gathered"]
    key = federation.rounds_key(work.settings)
    program = rounds_of(work)
    data = work.placement.axis.place(work.data.clients)
    state = program.initial_state(before["global_model"], key)
    run = jax.jit(functools.partial(program.run, data, key))
    expected = []
    for number in (2, 3, 4):
        sent = by_hand(work, key, state.model, number)
        expected += [(number, *one) for one in sent]
        state, _, _ = run(state, number)
    columns = [np.array(column) for column in zip(*expected, strict=True)]
    number, label, client, feature = columns
    # Clients in turn, each with its classes in order; clusters of a class in any.
    np.testing.assert_array_equal(found.round, number)
    np.testing.assert_array_equal(found.client, client)
    np.testing.assert_array_equal(found.label, label)
    np.testing.assert_allclose(found.feature, feature, rtol=1e-4, atol=1e-5)
    tiny.close(after["global_model"], state.model, 1e-4)
    assert len(np.unique(label)) > 5 and len(number) > 60
    moved = [found.feature[found.round == n][0] for n in (2, 4)]
    assert np.abs(moved[0] - moved[1]).max() > 1e-3


def test_rounds_are_what_they_are_without(plain, tmp_path):
    _, _, after, _ = plain
    changes = {"prototypes__gathered": "once"}
    _, _, without, _ = warmed_up(tmp_path, **changes)
    assert "gathered" not in without
    tiny.close(after["global_model"], without["global_model"])


def test_bytes_by_hand(plain):
    """Four bytes for each feature and for the label, besides the models."""
    _, _, after, found = plain
    gathered = after["gathered"]
    assert set(found.up) == {"models", "prototypes"} and set(found.down) == {"models"}
    assert found.up["prototypes"] == 4 * (gathered.feature.size + len(gathered.label))


@pytest.mark.slow
def test_states_in_host_memory_change_nothing(plain, tmp_path):
    _, _, after, _ = plain
    _, _, on_host, _ = warmed_up(tmp_path, compute__client_state="host")
    tiny.close(on_host["gathered"], after["gathered"], 1e-4)


def test_who_takes_no_part_sends_nothing(tmp_path):
    work, _, after, _ = warmed_up(tmp_path, init__clients_per_round=2)
    found, program = after["gathered"], rounds_of(work)
    key = federation.rounds_key(work.settings)
    for number in (2, 3, 4):
        (who,) = program.participation.participants(key, number)
        assert set(found.client[found.round == number]) == set(np.asarray(who).tolist())


@pytest.mark.slow
def test_a_part_of_the_network_has_no_other_features(tmp_path):
    """Static batch-norm: the model is read by statistics that clients are asked for."""
    changes = {
        "init__method": "heterofl",
        "budgets__rates": (1.0, 0.5, 0.5),
        "model__width": 4,
    }
    _, _, after, outcome = warmed_up(tmp_path, **changes)
    found = after["gathered"]
    used = (found.feature != 0).any(1)
    assert used.all()
    channels = [(found.feature[found.client == i] != 0).any(0).sum() for i in range(3)]
    assert channels[0] > channels[1] == channels[2] > 0
    assert outcome.up["moments"] > 0 and outcome.down["queried_models"] > 0


def test_labels_that_are_assumed_are_of_classes_that_clients_hold(plain):
    work, _, _, found = plain
    context = work.placement.context(running.link_of(work, "warmup"))
    gatherer = gathering.Gathering(context, rounds_of(work), rounds=3, first=2)
    empty = jax.eval_shape(gatherer.empty)
    label = gatherer._assumed((), empty.label)
    assert label.shape == empty.label.shape == (3, 3, 10 * CLUSTERS)
    count = work.data.clients.client.label_count
    for i in range(3):
        kept = label[0, i][label[0, i] >= 0]
        assert set(kept.tolist()) == set(np.flatnonzero(count[i]).tolist())
    real = len(found.artifacts["gathered"].label)
    assert 0.5 < (label >= 0).sum() / real < 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"prototypes__space": "expert"},
            "prototypes.space = 'expert': must be 'global' for prototypes.gathered =",
        ),
        (
            {"warmup__rounds": 0},
            "warmup.rounds = 0: must be > 0 for prototypes.gathered =",
        ),
    ],
)
def test_what_cannot_be_gathered_is_told_in_one_line(changes, told):
    with pytest.raises(errors.ConfigError) as caught:
        tiny.study(**FIELDS | changes)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
