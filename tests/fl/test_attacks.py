"""Attacks: known answers, who attacks, and what settings refuse."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, prng
from mosaic_jax.fl import attacks
from mosaic_jax.fl.attacks import ATTACKS
from mosaic_jax.run import settings, study
from tests import tiny
from tests.tiny import KEY

UPDATE = (np.array([[1.0, -2.0], [3.0, 6.0], [5.0, 1.0], [9.0, 9.0]], np.float32),)
ATTACKERS = jnp.array([True, True, True, False])
# Of seven clients two attack.
FIELDS = {"data__num_clients": 7, "attack__share": 0.3, "method": "federated"}


def sent(attack):
    return np.asarray(attack.updates(UPDATE, ATTACKERS, KEY)[0])


def test_an_update_with_another_factor():
    np.testing.assert_array_equal(sent(attacks.SignFlip()), -UPDATE[0])
    np.testing.assert_array_equal(sent(attacks.Scaled(factor=-10.0)), -10 * UPDATE[0])


def test_noise_has_its_deviation_and_nothing_of_the_update():
    wide = (jnp.full((1, 40_000), 7.0),)
    found = attacks.Gaussian(deviation=2.0).updates(wide, ATTACKERS[:1], KEY)[0]
    assert abs(float(found.mean())) < 0.05 and abs(float(found.std()) - 2) < 0.05


def test_alie_is_some_deviations_from_the_attackers_mean():
    own = UPDATE[0][:3]
    expected = own.mean(axis=0) - 1.5 * own.std(axis=0)
    for row in sent(attacks.ALIE(z=1.5))[:3]:
        np.testing.assert_allclose(row, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("clients", "attackers", "share"),
    # Of 50 with 24 attackers two more must be won over: 24 of the 26 others are nearer.
    [(50, 24, 24 / 26), (10, 3, 4 / 7), (20, 4, 9 / 16), (10, 8, 0.99), (10, 0, 0.5)],
)
def test_alies_own_z_wins_a_majority(clients, attackers, share):
    expected = statistics.NormalDist().inv_cdf(share)
    found = attacks.largest_z(clients, jnp.asarray(attackers))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_alie_is_like_that_by_default():
    expected = attacks.ALIE(z=float(attacks.largest_z(4, jnp.array(3))))
    np.testing.assert_allclose(sent(attacks.ALIE()), sent(expected), rtol=1e-5)


def test_who_attacks_is_drawn_by_the_seed():
    drawn = [attacks.drawn(prng.root(seed), 20, 6).tolist() for seed in range(5)]
    assert all(sorted(set(one)) == one and len(one) == 6 for one in drawn)
    assert len(set(map(tuple, drawn))) > 1
    assert drawn[0] == attacks.drawn(prng.root(0), 20, 6).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_flipped_labels_are_those_of_attackers_alone(seed):
    changes = FIELDS | {"seed": seed}
    clean = study.build(tiny.study(**changes)).data
    found = study.build(tiny.study(attack__name="label_flip", **changes))
    data = found.data
    assert len(data.attackers) == 2 and clean.attackers == ()
    for i, rows in enumerate(data.parts):
        true, told = (
            np.asarray(one.clients.images.label)[rows] for one in (clean, data)
        )
        hostile = i in data.attackers
        np.testing.assert_array_equal(told, 9 - true if hostile else true)
        count = np.bincount(told, minlength=10)
        np.testing.assert_array_equal(data.label_count[i], count)
        np.testing.assert_array_equal(data.clients.client.label_count[i], count)
    assert data.sha256 == clean.sha256
    assert data.content_sha256 != clean.content_sha256
    assert found.sending.attack is None  # what they send is honest work
    # A study of the same data flips nothing back.
    again = study.build(found.settings, data).data
    assert again.content_sha256 == data.content_sha256


def test_attackers_of_updates_have_true_labels():
    clean = study.build(tiny.study(**FIELDS)).data
    found = study.build(tiny.study(attack__name="sign_flip", **FIELDS)).data
    assert len(found.attackers) == 2
    assert found.content_sha256 == clean.content_sha256


def refused(**changes):
    with pytest.raises(errors.ConfigError) as caught:
        tiny.study(**FIELDS | changes)
    return str(caught.value)


OTHER_UPLOADS = (
    "whose clients send prototypes or parts of the network, or run programs of their "
    "own"
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"attack__name": "sign_flip", "attack__share": 0.05},
            "attack.share = 0.05: must be > 0.0714286 for attack.name = 'sign_flip': 1"
            " of data.num_clients = 7 must attack at least",
        ),
        (
            {"attack__name": "alie", "attack__share": 0.2},
            "attack.share = 0.2: must be > 0.214286 for attack.name = 'alie': 2 of"
            " data.num_clients = 7 must attack at least",
        ),
        (
            {"attack__name": "sign_flip", "init__method": "heterofl"},
            "attack.name = 'sign_flip': must be none or label_flip for init.method ="
            f" 'heterofl', {OTHER_UPLOADS}",
        ),
        (
            {"aggregation__rule": "median", "init__method": "fedproto"},
            "aggregation.rule = 'median': must be mean for init.method = 'fedproto',"
            f" {OTHER_UPLOADS}",
        ),
        (
            {"compression__name": "sign", "init__method": "fedrolex"},
            "compression.name = 'sign': must be none for init.method = 'fedrolex',"
            f" {OTHER_UPLOADS}",
        ),
        (
            {"attack__name": "alie", "compression__name": "top_k"},
            "attack.name = 'alie': must be another for compression.name = 'top_k':"
            " attackers would send what is not compressed",
        ),
        (
            {"attack__name": "alie", "compute__client_state": "host"},
            "compute.client_state = 'host': must be auto or device for attack.name ="
            " 'alie', whose attackers wait for each other",
        ),
        (
            {"aggregation__rule": "krum", "aggregation__attackers": 3},
            "aggregation.attackers = 3: must be <= 2 for aggregation.rule = 'krum' and"
            " 7 clients in a round",
        ),
        (
            {
                "aggregation__rule": "trimmed_mean",
                "aggregation__attackers": 2,
                "init__clients_per_round": 4,
            },
            "aggregation.attackers = 2: must be <= 1 for aggregation.rule ="
            " 'trimmed_mean' and 4 clients in a round",
        ),
        (
            {"aggregation__rule": "krum", "init__clients_per_round": 2},
            "aggregation.rule = 'krum': must be another for 2 clients in a round: too"
            " few",
        ),
    ],
)
def test_what_is_refused(changes, told):
    assert refused(**changes) == told


def test_more_selected_than_are_honest_is_refused():
    mapping = tiny.config(aggregation__rule="multi_krum", **FIELDS).to_dict()
    mapping["methods"]["multi_krum"]["selected"] = 7
    with pytest.raises(errors.ConfigError) as caught:
        study.build(settings.from_mapping(mapping))
    assert str(caught.value) == (
        "methods.multi_krum.selected = 7: must be <= 6, the 7 clients of a round but"
        " aggregation.attackers = 1"
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_keeps_shapes_and_goes_by_its_rows(name):
    """One that does not collude changes a client alone as it does among others."""
    attack = ATTACKS[name]()
    found = jax.eval_shape(attack.updates, UPDATE, ATTACKERS, KEY)
    assert [x.shape for x in found] == [x.shape for x in UPDATE]
    if attack.colludes or name == "gaussian":
        return
    alone = attack.updates((UPDATE[0][1:2],), ATTACKERS[1:2], KEY)[0]
    np.testing.assert_array_equal(alone[0], sent(attack)[1])
