"""Splits: the published table, and what every split must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_jax import errors
from mosaic_jax.data import partition
from tests import golden

LABELS = np.repeat(np.arange(10), 100)


def test_published_cifar10_table():
    known = golden.PARTITION
    labels = np.repeat(np.arange(10), 5000)
    parts = partition.split(
        labels,
        mode=known["mode"],
        num_clients=known["num_clients"],
        alpha=known["alpha"],
        seed=known["seed"],
    )
    counts = partition.label_counts(labels, parts, 10)
    np.testing.assert_array_equal(counts, known["label_counts"])


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(partition.MODES),
    num_clients=st.integers(1, 20),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 2**31 - 1),
)
def test_parts_are_disjoint_and_reproducible(mode, num_clients, alpha, seed):
    args = {"mode": mode, "num_clients": num_clients, "alpha": alpha, "seed": seed}
    parts = partition.split(LABELS, **args)
    together = np.concatenate(parts)
    assert len(parts) == num_clients
    assert len(np.unique(together)) == len(together)
    if mode != "dirichlet_balanced":
        assert len(together) == len(LABELS)
    if mode == "dirichlet_unbalanced":
        assert min(map(len, parts)) >= partition.MIN_SIZE
    if mode == "dirichlet_balanced":
        assert {len(part) for part in parts} == {len(LABELS) // num_clients}
    assert partition.digest(parts) == partition.digest(partition.split(LABELS, **args))


def test_small_alpha_concentrates_classes():
    def held(alpha):
        parts = partition.split(
            LABELS, mode="dirichlet_balanced", num_clients=5, alpha=alpha, seed=0
        )
        return (partition.label_counts(LABELS, parts, 10) > 0).sum()

    assert held(0.01) < held(100.0)


def test_an_alpha_whose_dirichlet_draw_rounds_to_nothing():
    labels = np.arange(40) % 2
    parts = partition.split(
        labels, mode="dirichlet_balanced", num_clients=4, alpha=1e-4, seed=0
    )
    counts = partition.label_counts(labels, parts, 2)
    # Each class fills two clients.
    np.testing.assert_array_equal(
        np.sort(counts, 0), [[0, 0], [0, 0], [10, 10], [10, 10]]
    )


def test_impossible_splits_name_the_setting():
    def split(**changes):
        args = {"mode": "iid", "num_clients": 3, "alpha": 1.0, "seed": 0} | changes
        return partition.split(LABELS[::100], **args)

    with pytest.raises(errors.DataError, match=r"data.num_clients = 11: must be <= 10"):
        split(num_clients=11)
    with pytest.raises(errors.DataError, match=r"data.num_clients = 3: must be <= 1 "):
        split(mode="dirichlet_unbalanced")
    with pytest.raises(errors.DataError, match=r"data.split = 'other': must be one of"):
        split(mode="other")


def test_tries_are_bounded(monkeypatch):
    monkeypatch.setattr(partition, "MAX_TRIES", 3)
    labels = np.repeat(np.arange(2), 500)
    with pytest.raises(errors.DataError, match=r"data.alpha = 0.0001: .* in 3 tries"):
        partition.split(
            labels, mode="dirichlet_unbalanced", num_clients=90, alpha=1e-4, seed=0
        )
