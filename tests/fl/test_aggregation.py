"""Averages of client models, and the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import aggregation
from mosaic_jax.nn import gating

CLIENTS = ModelState(
    params={"w": jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])},
    batch_stats={"m": jnp.array([0.0, 1.0, 2.0])},
)
GLOBAL = ModelState(
    params={"w": jnp.array([9.0, 9.0])}, batch_stats={"m": jnp.array(9.0)}
)


def test_weighted_mean_by_hand():
    mean = aggregation.federated_average(CLIENTS, jnp.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(mean.params["w"], [2.5, 5.0])
    assert mean.batch_stats["m"] == pytest.approx(0.75)


def test_summed_weighted_trees_are_the_mean():
    weight = jnp.array([0.25, 0.75, 0.0])
    lost = CLIENTS.replace(batch_stats={"m": jnp.array([0.0, 1.0, jnp.nan])})
    each = jax.vmap(aggregation.weighted)(lost, weight)
    total = jax.tree.map(lambda x: x.sum(axis=0), each)
    np.testing.assert_allclose(total.params["w"], [2.5, 5.0])
    assert total.batch_stats["m"] == pytest.approx(0.75)


def test_order_scale_and_weight_zero_do_not_matter():
    weight = jnp.array([1.0, 3.0, 2.0])
    mean = aggregation.federated_average(CLIENTS, weight)
    order = jnp.array([2, 0, 1])
    turned = jax.tree.map(lambda x: x[order], CLIENTS)
    for other in (
        aggregation.federated_average(turned, weight[order]),
        aggregation.federated_average(CLIENTS, 7 * weight),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, other
        )
    broken = jax.tree.map(lambda x: x.at[2].set(jnp.nan), CLIENTS)
    without = aggregation.federated_average(broken, jnp.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(without.params["w"], [2.5, 5.0])


def test_one_hot_counts_make_that_client_the_expert():
    count = jnp.array([[0, 5, 0], [4, 0, 0], [0, 0, 1]])
    experts = aggregation.class_experts(CLIENTS, count, GLOBAL)
    np.testing.assert_array_equal(experts.model.params["w"], [[3, 6], [1, 2], [5, 7]])
    assert experts.present.all()


def test_experts_weigh_by_class_and_absent_classes_fall_back():
    count = jnp.array([[1, 0], [3, 0], [0, 0]])
    experts = aggregation.class_experts(CLIENTS, count, GLOBAL)
    np.testing.assert_allclose(experts.model.params["w"], [[2.5, 5.0], [9.0, 9.0]])
    np.testing.assert_allclose(experts.model.batch_stats["m"], [0.75, 9.0])
    assert experts.present.tolist() == [True, False]


def test_gate_keeps_the_most_probable_experts():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    np.testing.assert_allclose(
        gating.global_topk(scores, 2), [[0.625, 0.375, 0.0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        gating.global_topk(scores, 3), [[0.5, 0.3, 0.2]], rtol=1e-6
    )


def test_uniform_gate_changes_nothing():
    expert_logits = jax.random.normal(jax.random.key(0), (2, 4, 3))
    gated = gating.apply(expert_logits, jnp.full((2, 4), 0.25))
    np.testing.assert_allclose(gated, expert_logits, rtol=1e-6)


def test_experts_average_over_those_who_hold_a_parameter():
    full, half = jnp.full(4, 2.0), jnp.array([6.0, 6.0, 0.0, 0.0])
    client = ModelState({"w": jnp.stack([full, half, half])}, {})
    share = ModelState({"w": jnp.stack([jnp.ones(4), half / 6, half / 6])}, {})
    count = jnp.array([[1, 0, 0], [3, 1, 0], [0, 1, 0]])
    model = ModelState({"w": jnp.full(4, 9.0)}, {})
    found = aggregation.class_experts(client, count, model, share)
    expected = [[5, 5, 2, 2], [6, 6, 9, 9], [9, 9, 9, 9]]
    np.testing.assert_allclose(found.model.params["w"], expected, rtol=1e-6)
    assert found.present.tolist() == [True, True, False]
