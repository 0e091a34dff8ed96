"""Closed forms of the measures; planted memorisation; fair to generators that know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mosaic_jax.core.types import Generators, ModelState
from mosaic_jax.fl import gan as gan_module
from mosaic_jax.run import runner
from mosaic_jax.stages import measures
from tests import running, tiny


def test_auc_counts_pairs():
    positive, negative = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert measures.auc(positive, negative).value == pytest.approx(np.mean(pairs))
    assert measures.auc(negative, positive).value == pytest.approx(1 - np.mean(pairs))


def test_auc_variance_is_that_of_repeated_draws():
    np_rng = np.random.RandomState(0)
    found = [measures.auc(np_rng.randn(80) + 0.5, np_rng.randn(60)) for _ in range(400)]
    measured = np.var([one.value for one in found])
    claimed = np.mean([one.variance for one in found])
    assert claimed == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("count", [1, 2, 11, 1000])
def test_auc_of_few_that_are_in_order_is_not_told_for_sure(count):
    found = measures.auc(np.arange(count) + 0.5, -np.arange(count))
    assert found.value == 1
    assert found.variance == pytest.approx(2 / (count + 2) ** 2)


@pytest.mark.parametrize(("count", "area"), [(4, 0.95), (10, 0.5), (10, 0.99)])
def test_auc_intervals_hold_what_they_say_of_few(count, area):
    np_rng = np.random.RandomState(0)
    away = np.sqrt(2) * scipy.stats.norm.ppf(area)
    found = [
        measures.auc(np_rng.randn(count) + away, np_rng.randn(count)).interval()
        for _ in range(400)
    ]
    assert np.mean([one["low"] <= area <= one["high"] for one in found]) > 0.94


def test_auc_of_many_has_delongs_variance():
    np_rng = np.random.RandomState(0)
    positive, negative = np_rng.randn(1000) + 0.5, np_rng.randn(800)
    above = np.mean(positive[:, None] > negative, axis=1)
    below = np.mean(positive[:, None] > negative, axis=0)
    delong = np.var(above, ddof=1) / 1000 + np.var(below, ddof=1) / 800
    assert measures.auc(positive, negative).variance == pytest.approx(delong, rel=0.01)


def test_nearest_by_hand():
    points = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    others = jnp.array([[3.0, 4.0], [1.0, 0.0], [3.0, 0.0]])
    distance, index = measures.nearest(points, others, jnp.array([True, True, False]))
    assert distance.tolist() == [1.0, 4.0]
    assert index.tolist() == [1, 1]


def test_fid_of_gaussians_by_hand():
    # In one dimension: (m1 - m2)^2 + (s1 - s2)^2.
    first = np.array([[-1.0], [1.0], [0.0]])
    second = 3 * first + 5
    assert measures.fid(first, second) == pytest.approx(25 + (3 - 1) ** 2)
    assert measures.fid(first, first) == pytest.approx(0, abs=1e-9)


def test_fid_of_many_dimensions_against_a_matrix_square_root():
    import scipy.linalg

    np_rng = np.random.RandomState(0)
    x, y = np_rng.randn(50, 4), np_rng.randn(60, 4) @ np_rng.randn(4, 4) + 1
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(
        a + b - 2 * scipy.linalg.sqrtm(a @ b).real
    )
    assert measures.fid(x, y) == pytest.approx(expected)


def test_kid_is_zero_for_the_same_distribution_and_grows():
    np_rng = np.random.RandomState(0)
    x, y = np_rng.randn(2, 500, 8)
    alike = measures.kid_estimate(x, y, np.random.RandomState(1))
    apart = measures.kid_estimate(x, y + 1, np.random.RandomState(1))
    assert abs(alike.value) < 4 * np.sqrt(alike.variance) + 0.05
    assert apart.value > 10 * abs(alike.value)


def test_matched_rows_have_the_same_classes():
    label, other = np.array([0, 0, 0, 1, 3]), np.array([0, 1, 1, 2, 0])
    rows, other_rows = measures.matched_rows(label, other, 99, np.random.RandomState(0))
    assert sorted(label[rows]) == sorted(other[other_rows]) == [0, 0, 1]
    assert len(set(rows)) == len(set(other_rows)) == 3
    rows, _ = measures.matched_rows(
        np.zeros(100, int), np.zeros(50, int), 10, np.random.RandomState(0)
    )
    assert len(rows) == 10


def test_coverage_and_label_distance_by_hand():
    predicted, count = np.array([0, 0, 1, 1]), np.array([30, 0, 10])
    assert measures.coverage(predicted, count) == 0.75
    # Shares .5 .5 0 against .75 0 .25.
    assert measures.label_distance(predicted, count) == 0.5


class Bank:
    """A "generator" that draws from a bank of images, its parameters."""

    latent_dim = 1

    def sample(self, generator, z):
        return generator.params["bank"][: len(z)]


NUM_IMAGES = 500


def planted(tmp_path, monkeypatch, banks, **changes):
    """Findings of the audit of generators that draw from `banks` [C][n, H, W, D]."""
    study = runner.Experiment(
        tiny.study(
            **{"audit__images": NUM_IMAGES, "audit__reference_steps": 20}
            | {"data__alpha": 100.0, "data__validation": 0.4}
            | changes
        ),
        tmp_path,
    )
    data = study.data
    monkeypatch.setattr(gan_module, "build", lambda *_: Bank())
    bank = np.stack([banks(data, number) for number in range(len(data.parts))])
    signed = jnp.asarray(bank, jnp.float32) / 127.5 - 1
    generators = Generators(
        model=ModelState({"bank": signed}, {}), alive=jnp.ones(len(bank), bool)
    )
    reference = jax.jit(study.study.classifier.init, static_argnums=1)(
        jax.random.key(0), data.info.image_shape
    )
    run = study.start(
        running.link_of(study, "audit"),
        {"reference_model": reference, "client_generators": generators},
    )
    return running.drive(run)


def copies(data, number):
    return data.clients.images.image[np.resize(data.parts[number], NUM_IMAGES)]


def others(data, number):
    """Of images that neither a client nor the audit holds."""
    image = data.held_out["validation"].image
    return image[np.random.RandomState(number).permutation(len(image))[:NUM_IMAGES]]


def test_memorisation_is_told_from_learning(tmp_path, monkeypatch):
    outcome = planted(tmp_path / "copies", monkeypatch, copies)
    found = outcome.headline
    assert found["auc"]["mean"] > 0.95
    assert found["feature_auc"]["mean"] > 0.95
    assert found["closer_to_training"]["mean"] > 0.95
    np.testing.assert_array_equal(
        outcome.pictures["generated"], outcome.pictures["nearest training image"]
    )
    found = planted(tmp_path / "others", monkeypatch, others).headline
    for name in ("auc", "feature_auc", "closer_to_training"):
        assert abs(found[name]["mean"] - 0.5) < 0.05
        assert found[name]["low"] <= 0.5 <= found[name]["high"]


def test_knowing_the_classes_is_no_leak(tmp_path, monkeypatch):
    """A client of few classes, a generator of just these."""

    def same_classes(data, number):
        image, label = (
            data.held_out["validation"].image,
            data.held_out["validation"].label,
        )
        held = np.flatnonzero(data.label_count[number][label])
        return image[np.random.RandomState(number).choice(held, NUM_IMAGES)]

    outcome = planted(tmp_path, monkeypatch, same_classes, data__alpha=0.1)
    assert outcome.headline["auc"]["mean"] < 0.6
