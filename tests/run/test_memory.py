"""How much runs at once, by the memory that is free."""

import dataclasses

import pytest

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


@pytest.mark.slow
def test_prototypes_of_many_images_need_more_than_a_step(told):
    work = built([5, 9000])
    known = work.settings, work.data.info, work.classifier
    few, many = (memory.prototypes_bytes(*known, count) for count in (9, 9000))
    assert many > memory.gan_bytes(*known) > few
    told(int(many * 2.5 / memory.SHARE))
    assert memory.clients_at_once(work) == 2
