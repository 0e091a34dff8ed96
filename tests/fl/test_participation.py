"""Who takes part in a round, whose uploads arrive, and how much each counts."""

import dataclasses

import jax
import numpy as np
import pytest

from mosaic_jax.core import prng
from mosaic_jax.fl.holdings import Group
from mosaic_jax.fl.participation import Participation
from tests import tiny

SIZES = np.array([3, 5, 7, 11, 13, 17])
GROUPS = (Group(1.0, np.arange(4)), Group(0.5, np.array([4, 5])))
KEY = prng.root(0)


def turnout(number=0, *, count=6, failures=0.0, weigh=lambda size: size):
    """Of round `number` of six clients in two groups."""
    local = dataclasses.replace(tiny.LOCAL, failures=failures)
    participation = Participation(GROUPS, count, local, weigh)
    client = tiny.dataset(SIZES).client
    return jax.jit(participation.turnout)(client, KEY, number)


def test_all_clients_count_by_their_images():
    found = turnout()
    np.testing.assert_array_equal(found.who, range(6))
    np.testing.assert_array_equal(found.weight, SIZES)
    assert (found.arrived, int(found.total), float(found.share)) == (None, 56, 1.0)


def test_those_who_are_drawn_come_from_all_groups():
    found = [turnout(number, count=3) for number in range(20)]
    for one in found:
        assert [len(group) for group in one.participants] == [2, 1]
        assert one.who[0] < one.who[1] < 4 <= one.who[2]
        np.testing.assert_array_equal(one.weight, SIZES[one.who])
        assert int(one.total) == SIZES[one.who].sum()
        assert float(one.share) == pytest.approx(int(one.total) / 56)
    assert {int(i) for one in found for i in one.who} == set(range(6))


@pytest.mark.parametrize("count", [6, 3])
def test_what_does_not_arrive_counts_for_nothing(count):
    found = [turnout(number, count=count, failures=0.5) for number in range(20)]
    for one in found:
        expected = np.where(one.arrived, SIZES[one.who], 0)
        np.testing.assert_array_equal(one.weight, expected)
        assert int(one.total) == expected.sum()
        assert float(one.share) == pytest.approx(expected.sum() / 56)
    lost = np.mean([~one.arrived for one in found])
    assert 0.2 < lost < 0.8


def test_weights_are_those_of_the_algorithm():
    found = turnout(count=3, weigh=lambda size: size * 0 + 1)
    np.testing.assert_array_equal(found.weight, 1)
    assert (int(found.total), float(found.share)) == (3, 0.5)
