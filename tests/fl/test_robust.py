"""Robust rules: known answers from NumPy, and what all of them promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.fl import robust
from mosaic_jax.fl.robust import RULES

CLIENTS, HOSTILE = 9, 3
SHAPES = {"kernel": (3, 5), "bias": (4,), "count": ()}
WEIGHT = jnp.arange(1.0, CLIENTS + 1)
every_rule = pytest.mark.parametrize("name", RULES)
ROBUST = [name for name in RULES if name != "mean"]


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """Two coordinates at a time: 7 chunks and a rest, 2 chunks, a rest."""
    monkeypatch.setattr(robust, "CHUNK", 2 * CLIENTS)


def sent(count=CLIENTS, seed=0):
    """Uploads of clients that differ."""
    np_rng = np.random.RandomState(seed)
    return {
        name: np_rng.normal(size=(count, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def combine(name, upload, weight=WEIGHT, attackers=HOSTILE, **fields):
    upload = jax.tree.map(jnp.asarray, upload)
    return RULES[name](**fields).combine(upload, weight, attackers)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


def scores(upload, attackers):
    """Krum's, from every pair of uploads as one long vector."""
    rows = np.concatenate(
        [leaf.reshape(len(leaf), -1) for leaf in upload.values()], axis=1
    )
    count, found = len(rows), []
    for i in range(count):
        square = [((rows[i] - rows[j]) ** 2).sum() for j in range(count) if j != i]
        found.append(sum(sorted(square)[: count - attackers - 2]))
    return np.array(found)


def mean_of(rows):
    return lambda leaf: leaf[rows].mean(axis=0)


def test_the_mean_is_weighted():
    upload = sent()
    expected = {k: np.average(v, axis=0, weights=WEIGHT) for k, v in upload.items()}
    close(combine("mean", upload), expected)


@pytest.mark.parametrize("count", [8, 9])
def test_median(count):
    upload = sent(count)
    expected = {k: np.median(v, axis=0) for k, v in upload.items()}
    close(combine("median", upload, jnp.ones(count)), expected)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_trimmed_mean(cut):
    upload = sent()
    expected = {
        k: np.sort(v, axis=0)[cut : CLIENTS - cut].mean(axis=0)
        for k, v in upload.items()
    }
    close(combine("trimmed_mean", upload, attackers=cut), expected)


@pytest.mark.parametrize("attackers", [0, 1, 3])
def test_krum(attackers):
    upload = sent()
    best = scores(upload, attackers).argmin()
    expected = {k: v[best] for k, v in upload.items()}
    close(combine("krum", upload, attackers=attackers), expected)


@pytest.mark.parametrize(("selected", "count"), [(0, 6), (2, 2)])
def test_multi_krum(selected, count):
    upload = sent()
    best = np.argsort(scores(upload, HOSTILE))[:count]
    expected = jax.tree.map(mean_of(best), upload)
    close(combine("multi_krum", upload, selected=selected), expected)


def test_multi_krum_of_one_is_krum():
    upload = sent()
    close(combine("multi_krum", upload, selected=1), combine("krum", upload))


@every_rule
def test_chunks_change_nothing(name, monkeypatch):
    upload = sent()
    found = combine(name, upload)
    monkeypatch.setattr(robust, "CHUNK", 2**20)
    close(combine(name, upload), found)


@every_rule
def test_the_order_of_clients_does_not_matter(name):
    upload, order = sent(), np.random.RandomState(1).permutation(CLIENTS)
    turned = jax.tree.map(lambda leaf: leaf[order], upload)
    close(combine(name, turned, WEIGHT[order]), combine(name, upload))


@every_rule
def test_who_does_not_count_changes_nothing_whatever_was_sent(name):
    """As if the others were alone, of whom fewer attack."""
    upload, kept = sent(), np.array([0, 1, 3, 4, 5, 7, 8])
    broken = jax.tree.map(lambda leaf: leaf.copy(), upload)
    for leaf in broken.values():
        leaf[2], leaf[6] = np.nan, np.inf
    weight = WEIGHT.at[jnp.array([2, 6])].set(0)
    alone = jax.tree.map(lambda leaf: leaf[kept], upload)
    expected = combine(name, alone, WEIGHT[kept], attackers=2)
    close(combine(name, broken, weight, attackers=2), expected)


@pytest.mark.parametrize("bad", [np.nan, 1e25])
@pytest.mark.parametrize("name", ["krum", "multi_krum"])
def test_what_is_far_from_all_still_comes_before_what_is_lost(name, bad):
    """Two uploads arrive, whose distance is infinite: one of them is the result."""
    upload = {"a": np.array([[9.0, 9.0], [1.0, 1.0], [bad, 1.0]], np.float32)}
    found = combine(name, upload, jnp.array([0.0, 1.0, 1.0]), attackers=1)["a"]
    np.testing.assert_array_equal(found, upload["a"][1])


def test_multi_krum_selects_none_that_is_infinitely_far():
    """Though fewer uploads are finite than it is to select."""
    upload = sent()
    for leaf in upload.values():
        leaf[0] = np.nan
    weight = jnp.zeros(CLIENTS).at[:4].set(1.0)
    rule = RULES["multi_krum"](selected=4)
    found = jax.jit(rule.combine, static_argnums=2)(upload, weight, 1)
    for key, leaf in upload.items():
        np.testing.assert_allclose(found[key], leaf[1:4].mean(axis=0), rtol=1e-6)


@every_rule
@pytest.mark.parametrize("left", [1, 2])
def test_a_single_upload_that_arrives_is_the_result(name, left):
    """Of two, something between them: no rule knows which is honest."""
    upload = sent()
    weight = jnp.zeros(CLIENTS).at[:left].set(1.0)
    found = combine(name, upload, weight)
    for key, leaf in upload.items():
        low, high = leaf[:left].min(axis=0), leaf[:left].max(axis=0)
        assert (found[key] >= low - 1e-6).all() and (found[key] <= high + 1e-6).all()


@pytest.mark.parametrize("value", [1e6, -np.inf, np.nan])
@pytest.mark.parametrize("name", ROBUST)
def test_rules_stay_with_the_honest(name, value):
    """As many attackers as a rule withstands move no coordinate out of their range."""
    upload = sent()
    most = RULES[name]().most_attackers(CLIENTS)
    for leaf in upload.values():
        leaf[:most] = value
    found = combine(name, upload, attackers=most)
    for key, leaf in upload.items():
        honest = leaf[most:]
        assert (found[key] >= honest.min(axis=0)).all(), key
        assert (found[key] <= honest.max(axis=0)).all(), key


def test_the_mean_does_not():
    upload = sent()
    upload["kernel"][0] = 1e6
    assert np.abs(combine("mean", upload)["kernel"]).min() > 1e4


@pytest.mark.parametrize(
    ("name", "clients", "most"),
    [
        ("median", 3, 1),
        ("median", 4, 1),
        ("trimmed_mean", 10, 4),
        ("trimmed_mean", 11, 5),
        ("krum", 3, 0),
        ("krum", 9, 3),
        ("krum", 10, 3),
        ("multi_krum", 11, 4),
        ("multi_krum", 2, -1),
    ],
)
def test_how_many_attackers_are_too_many(name, clients, most):
    assert RULES[name]().most_attackers(clients) == most


@pytest.mark.parametrize("name", ROBUST)
def test_what_a_rule_needs_on_the_way_is_of_a_chunk(name, monkeypatch):
    """Beyond its result; all coordinates sorted at once would be eight times that."""
    monkeypatch.setattr(robust, "CHUNK", 2**12)
    size = 2**16
    upload = {"kernel": jax.ShapeDtypeStruct((8, size), jnp.float32)}
    program = jax.jit(RULES[name]().combine, static_argnums=2)
    memory = program.lower(upload, jnp.ones(8), 1).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * size + 2**19
