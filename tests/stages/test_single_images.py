"""Prototypes of one image are counted, by the numbers of images alone."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.fl import prototypes
from mosaic_jax.run import study
from mosaic_jax.stages import sections, single_images
from mosaic_jax.stages.base import Outcome
from tests import tiny

LABEL_COUNT = np.array([[0, 1, 2, 3], [4, 5, 6, 9]])


def test_counts_by_hand():
    """Three centres of each class: means of one or two images, then clusters."""
    made, single = single_images.count(LABEL_COUNT, 3)
    assert made.tolist() == [[0, 1, 1, 3], [3, 3, 3, 3]]
    assert single.tolist() == [[0, 1, 0, 3], [2, 1, 0, 0]]
    # A single centre is one image's only where there is one image.
    made, single = single_images.count(LABEL_COUNT, 1)
    assert made.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert single.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("clusters", [1, 4])
def test_no_more_are_told_than_k_means_makes(clusters):
    """And just as many where there are no more images than centres."""
    label = np.repeat(np.arange(9), np.arange(9))
    held_count = np.bincount(label, minlength=9)
    feature = np.random.RandomState(0).randn(len(label), 2).astype(np.float32)
    cluster, held = prototypes.cluster_classes(
        jax.random.key(0),
        jnp.asarray(feature),
        jnp.asarray(label),
        jnp.ones(len(label), bool),
        num_classes=9,
        num_clusters=clusters,
        num_steps=5,
    )
    found = [
        np.bincount(np.asarray(cluster)[label == k], minlength=clusters)
        for k in range(9)
    ]
    made, single = single_images.count(held_count[None], clusters)
    np.testing.assert_array_equal(held.sum(axis=1), made[0])
    of_one = np.array([np.sum(sizes == 1) for sizes in found])
    assert np.all(of_one >= single[0])
    few = held_count <= clusters
    np.testing.assert_array_equal(of_one[few], single[0][few])


def context_of(label_count, clusters=3):
    number = np.arange(len(label_count)) + 5
    client = types.SimpleNamespace(number=number)
    data = types.SimpleNamespace(
        label_count=label_count, clients=types.SimpleNamespace(client=client)
    )
    return types.SimpleNamespace(
        data=data, settings=tiny.study(prototypes__clusters=clusters)
    )


def test_who_sends_them_is_said_everywhere(caplog):
    before = Outcome(
        artifacts={},
        results={"clients": ["kept"]},
        headline={"auc": {}},
        clients={"membership AUC": {5: "0.5"}},
        section=sections.Section("Audit", (sections.Text("Kept."),)),
    )
    found = single_images.added(context_of(LABEL_COUNT), before)
    told = (
        "least 7 of 17 prototypes (41.2 %) are the features of a single image, of"
        " clients 5, 6"
    )
    assert [r.message for r in caplog.records] == [f"audit: at {told}"]
    assert found.results["clients"] == ["kept"]
    assert found.results["prototypes"] == [
        {
            "client": 5,
            "prototypes": 5,
            "single_images": 4,
            "single_images_of_class": [0, 1, 0, 3],
        },
        {
            "client": 6,
            "prototypes": 12,
            "single_images": 3,
            "single_images_of_class": [2, 1, 0, 0],
        },
    ]
    share = found.headline["single_image_prototypes"]
    assert share["mean"] == share["low"] == share["high"] == 7 / 17
    assert set(found.headline) == {"auc", "single_image_prototypes"}
    assert found.clients["prototypes of one image"] == {5: "4 of 5", 6: "3 of 12"}
    assert [block.text for block in found.section.blocks] == ["Kept.", f"At {told}."]


def test_none_is_no_warning(caplog):
    plenty = np.full((2, 4), 6)
    found = single_images.added(context_of(plenty), Outcome(artifacts={}))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert found.headline["single_image_prototypes"]["mean"] == 0
    assert found.section.blocks[0].text.startswith("At least 0 of 24 prototypes")


def test_many_clients_are_counted_not_named(caplog):
    single_images.added(context_of(np.ones((30, 4), int)), Outcome(artifacts={}))
    assert caplog.records[0].message.endswith("of 30 clients")


def test_the_number_of_centres_counts_for_the_audit():
    def fingerprints(**changes):
        plan = study.build(tiny.study(audit__images=4, **changes)).plan()
        return {link.name: fingerprint for link, fingerprint in plan}

    plain, other = fingerprints(), fingerprints(prototypes__clusters=2)
    changed = {name for name in plain if plain[name] != other[name]}
    assert {"prototypes", "audit"} <= changed
    assert "reference" not in changed
