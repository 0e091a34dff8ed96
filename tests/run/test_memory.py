"""How much runs at once, by the memory that is free."""

import dataclasses
import math

import jax
import pytest

from mosaic_jax.core import trees
from mosaic_jax.run import memory, study
from tests import tiny


@pytest.fixture
def told(monkeypatch):
    """Tells the library how much memory is free."""

    def tell(free):
        monkeypatch.setattr(memory.environment, "free_memory", lambda: free)

    return tell


def built(sizes, **changes):
    """A study whose clients have `sizes` images, and a tiny network."""
    found = study.build(tiny.study(**changes))
    return dataclasses.replace(
        found,
        data=dataclasses.replace(found.data, clients=tiny.dataset(sizes)),
        networks={"cnn": tiny.classifier(10)},
    )


@pytest.mark.slow
def test_clients_at_once_from_free_memory(told):
    work = built([5, 9])
    known = work.settings, work.data.info, work.classifier
    assert memory.clients_at_once(work) == 0  # CPUs do not tell
    needed = memory.gan_bytes(*known)
    assert needed > memory.classifier_bytes(*known) > 0
    assert needed > memory.prototypes_bytes(*known, 9) > 0
    free = int(needed * 3.5 / memory.SHARE)
    told(free)
    assert memory.clients_at_once(work) == 3
    assert memory.seeds_at_once(work) == 1
    told(2 * free)
    assert memory.seeds_at_once(work) == 7 // 2
    told(1)
    assert memory.clients_at_once(work) == 1
    chosen = tiny.study(compute__clients_at_once=7)
    assert memory.clients_at_once(dataclasses.replace(work, settings=chosen)) == 7


def test_uploads_that_are_kept_take_memory_from_clients(told):
    fields = {"method": "federated", "compute__clients_at_once": 0}
    summed, kept, some = (
        built([5, 9, 4], **fields | changes)
        for changes in (
            {},
            {"aggregation__rule": "median"},
            {
                "attack__name": "alie",
                "attack__share": 0.67,
                "init__clients_per_round": 2,
            },
        )
    )
    model = jax.eval_shape(
        lambda: kept.classifier.init(jax.random.key(0), kept.data.info.image_shape)
    )
    size = trees.num_bytes(model)
    found = [memory.uploads_bytes(work) for work in (summed, kept, some)]
    assert found == [0, 3 * size, 2 * size]
    needed = memory.classifier_bytes(kept.settings, kept.data.info, kept.classifier)
    told(math.ceil(3 * needed / memory.SHARE) + 1)
    assert memory.clients_at_once(summed) == 3
    assert memory.clients_at_once(kept) == 2


def test_what_compression_leaves_out_counts_among_the_clients_states(told):
    fields = {"method": "federated", "init__method": "fedavg"}
    plain = built([5, 9], **fields)
    signs = built([5, 9], compression__name="sign", **fields)
    told(100)
    assert not memory.state_on_host(plain) and memory.state_on_host(signs)


def test_images_stay_on_the_host_where_they_would_take_too_much(told):
    fields = {"method": "federated", "init__clients_per_round": 1}
    work = built([50, 90], **fields)
    assert not memory.images_on_host(work)  # CPUs do not tell
    size = 140 * 16 * 16
    told(int(size / memory.IMAGE_SHARE) + 1)
    assert not memory.images_on_host(work)
    told(int(size / memory.IMAGE_SHARE) - 1)
    assert memory.images_on_host(work)
    # Each of two devices has a half, where clients have a device of their own.
    assert not memory.images_on_host(
        built([50, 90], method="federated", compute__devices=2)
    )
    chosen = built([50, 90], **fields, compute__images="device")
    assert not memory.images_on_host(chosen)
    assert not memory.images_on_host(built([50, 90]))  # generators need them


def test_images_of_who_is_next_take_memory_from_clients(told):
    fields = {"method": "federated", "compute__clients_at_once": 0}
    device, host = (
        built([50, 90, 70], **fields, compute__images=where)
        for where in ("device", "host")
    )
    needed = memory.classifier_bytes(
        device.settings, device.data.info, device.classifier
    )
    told(math.ceil(3 * needed / memory.SHARE) + 1)
    assert memory.clients_at_once(device) == 3
    images = 2 * 90 * 16 * 16
    assert memory.clients_at_once(host) == 3 * needed // (needed + images)


@pytest.mark.slow
def test_prototypes_of_many_images_need_more_than_a_step(told):
    work = built([5, 9000])
    known = work.settings, work.data.info, work.classifier
    few, many = (memory.prototypes_bytes(*known, count) for count in (9, 9000))
    assert many > memory.gan_bytes(*known) > few
    told(int(many * 2.5 / memory.SHARE))
    assert memory.clients_at_once(work) == 2
