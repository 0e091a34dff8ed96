"""k-means against cases with one right answer."""

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import prototypes


def run(feature, mask, num_clusters):
    return prototypes.kmeans(
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
