"""k-means against cases with one right answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.fl import prototypes

kmeans = jax.jit(prototypes.kmeans, static_argnames=("num_clusters", "num_steps"))


def run(feature, mask, num_clusters):
    return kmeans(
        jax.random.key(0), feature, mask, num_clusters=num_clusters, num_steps=20
    )


def test_far_groups_are_found():
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    noise = np.random.RandomState(0).uniform(-1, 1, (30, 2))
    group = np.arange(30) % 3
    feature = jnp.asarray(centres[group] + noise, jnp.float32)
    cluster, held = run(feature, jnp.ones(30, bool), 3)
    assert held.all()
    for k in range(3):
        assert len(set(np.asarray(cluster)[group == k].tolist())) == 1
    means, _ = prototypes.cluster_means(feature, jax.nn.one_hot(cluster, 3))
    expected = np.stack([feature[group == k].mean(0) for k in range(3)])
    order = [int(cluster[np.flatnonzero(group == k)[0]]) for k in range(3)]
    np.testing.assert_allclose(means[jnp.array(order)], expected, rtol=1e-4, atol=1e-4)


def test_masked_rows_take_no_part():
    feature = jnp.array([[0.0], [1.0], [10.0], [11.0], [1e6]])
    mask = jnp.array([True, True, True, True, False])
    cluster, held = run(feature, mask, 2)
    assert held.tolist() == [True, True]
    assert cluster[0] == cluster[1] != cluster[2]
    assert cluster[2] == cluster[3]


def test_fewer_rows_than_clusters_give_their_mean():
    feature = jnp.array([[1.0], [3.0], [100.0]])
    mask = jnp.array([True, True, False])
    cluster, held = run(feature, mask, 3)
    assert held.tolist() == [True, False, False]
    member = jax.nn.one_hot(cluster, 3) * mask[:, None]
    assert prototypes.cluster_means(feature, member)[0][0, 0] == 2.0


def test_no_rows_hold_no_cluster():
    _, held = run(jnp.ones((4, 2)), jnp.zeros(4, bool), 2)
    assert not held.any()


def lloyd(feature, mask, num_clusters, num_steps):
    """By NumPy, in float64; each seed is the row farthest from those before it."""
    rows = np.flatnonzero(mask)
    seeds = [rows[0]]
    for _ in range(num_clusters - 1):
        square = ((feature[rows][:, None] - feature[seeds][None]) ** 2).sum(-1)
        seeds.append(rows[square.min(1).argmax()])
    centres = feature[seeds]

    def nearest():
        return ((feature[:, None] - centres[None]) ** 2).sum(-1).argmin(1)

    for _ in range(num_steps):
        member = nearest()
        for k in range(num_clusters):
            mine = mask & (member == k)
            if mine.any():
                centres[k] = feature[mine].mean(0)
    return nearest()


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_lloyds_iterations_equal_numpy(monkeypatch, seed, num_steps):
    monkeypatch.setattr(jax.random, "categorical", lambda _, log_p: jnp.argmax(log_p))
    np_rng = np.random.RandomState(seed)
    feature = np_rng.uniform(-0.5, 0.5, (60, 3)) * np.array([1, 2, 0.5])
    mask = np_rng.uniform(size=60) < 0.7
    cluster, held = prototypes.kmeans(
        jax.random.key(0),
        jnp.asarray(feature, jnp.float32),
        jnp.asarray(mask),
        num_clusters=5,
        num_steps=num_steps,
    )
    expected = lloyd(feature, mask, 5, num_steps)
    np.testing.assert_array_equal(np.asarray(cluster)[mask], expected[mask])
    assert held.tolist() == [k in expected[mask] for k in range(5)]


def test_the_iterations_of_the_comparison_matter():
    """Each step moves some row in one of the seeds above."""
    for num_steps in range(3):
        moved = 0
        for seed in range(5):
            np_rng = np.random.RandomState(seed)
            feature = np_rng.uniform(-0.5, 0.5, (60, 3)) * np.array([1, 2, 0.5])
            mask = np_rng.uniform(size=60) < 0.7
            before, after = (lloyd(feature, mask, 5, num_steps + i) for i in (0, 1))
            moved += np.any(before[mask] != after[mask])
        assert moved


def test_seeds_lie_apart():
    """Drawn by squared distance: far groups have one each, whatever the key."""
    centres = np.array([[1000.0, 0.0], [1050.0, 0.0], [1000.0, 50.0]])
    noise = np.random.RandomState(0).uniform(-1, 1, (30, 2))
    feature = jnp.asarray(centres[np.arange(30) % 3] + noise, jnp.float32)
    run = functools.partial(kmeans, num_clusters=3, num_steps=0)
    keys = jax.random.split(jax.random.key(0), 20)
    drawn, _ = jax.vmap(run, (0, None, None))(keys, feature, jnp.ones(30, bool))
    apart = [len(set(cluster[:3].tolist())) == 3 for cluster in np.asarray(drawn)]
    assert np.mean(apart) > 0.9
    # The first is any row.
    assert len({int(cluster[0]) for cluster in drawn}) > 1


def test_as_many_rows_as_clusters_are_one_each():
    feature = jnp.array([[1.0], [3.0], [7.0], [100.0]])
    mask = jnp.array([True, True, True, False])
    cluster, held = run(feature, mask, 3)
    assert held.all()
    assert sorted(cluster[:3].tolist()) == [0, 1, 2]


def test_means_of_clusters_by_hand():
    feature = jnp.array([[1.0, 2.0], [3.0, 6.0], [10.0, 20.0]])
    member = jnp.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    mean, held = prototypes.cluster_means(feature, member)
    np.testing.assert_array_equal(mean, [[2, 4], [0, 0], [10, 20]])
    assert held.tolist() == [True, False, True]


def test_rows_that_coincide_are_one_cluster():
    feature = jnp.array([[9.0], [2.0], [2.0], [2.0]])
    cluster, held = run(feature, jnp.array([False, True, True, True]), 2)
    assert len(set(cluster[1:].tolist())) == 1
    assert held.sum() == 1


def test_classes_are_clustered_apart():
    """Two far groups in each class; the last row is past the client's images."""
    feature = jnp.array([[0.0], [1.0], [50.0], [52.0], [3.0], [90.0], [0.5]])
    label = jnp.array([0, 0, 0, 0, 2, 2, 2])
    cluster, held = prototypes.cluster_classes(
        jax.random.key(0),
        feature,
        label,
        jnp.arange(7) < 6,
        num_classes=3,
        num_clusters=2,
        num_steps=5,
    )
    np.testing.assert_array_equal(held, [[True, True], [False, False], [True, True]])
    assert cluster[0] == cluster[1] != cluster[2] == cluster[3]
    assert {int(cluster[4]), int(cluster[5])} == {0, 1}
    assert cluster[6] == 2
    centre = prototypes.centres(feature, label, cluster, num_classes=3, num_clusters=2)
    assert centre.shape == (3, 2, 1)
    np.testing.assert_array_equal(np.sort(centre[0, :, 0]), [0.5, 51])
    np.testing.assert_array_equal(centre[1], 0)
    np.testing.assert_array_equal(np.sort(centre[2, :, 0]), [3, 90])
