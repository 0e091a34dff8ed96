"""Plans of unequal work: everything once, in order, and next to no idle lanes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_jax.fl import parallel, schedule
from tests import golden

# Images of the ten clients in the published CIFAR-10 split: 72 to 9999.
SEED_TABLE = [sum(row) for row in golden.PARTITION["label_counts"]]


def run(plan, num_clients, every):
    """Carry a plan out; returns steps done and steps processed."""
    done, processed, most = np.zeros(num_clients, int), 0, 0
    for start in range(0, plan.length, every):
        window = plan.pieces(start, min(start + every, plan.length))
        assert len(window.count) <= plan.capacity
        assert (window.count > 0).all() and (window.client >= -1).all()
        most = max(most, len(window.count))
        for who, first, count in zip(
            window.client, window.first, window.count, strict=True
        ):
            live = who >= 0
            assert len(set(who[live])) == live.sum(), "a client on two lanes at once"
            np.testing.assert_array_equal(done[who[live]], first[live])
            done[who[live]] += count
            processed += count * len(who)
    # Nor are many more pieces reserved than there are.
    assert plan.capacity <= max(most + 2, num_clients)
    return done, processed


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_every_step_once_and_in_order(steps, at_once, every):
    lanes = schedule.num_lanes(np.array(steps), at_once)
    plan = schedule.DevicePlan(np.array(steps), lanes, every)
    done, processed = run(plan, len(steps), every)
    np.testing.assert_array_equal(done, steps)
    assert processed == plan.processed <= sum(steps) + lanes


def test_two_lanes_by_hand():
    plan = schedule.DevicePlan(np.array([3, 2, 1]), 2, 10)
    window = plan.pieces(0, 3)
    # Client 0 fills the first lane; 1 and 2 share the second.
    assert plan.length == 3
    np.testing.assert_array_equal(window.client, [[0, 1], [0, 2]])
    np.testing.assert_array_equal(window.first, [[0, 0], [2, 0]])
    np.testing.assert_array_equal(window.count, [2, 1])


@pytest.mark.parametrize("at_once", [1, 10])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_published_split_wastes_less_than_a_fifth(at_once, num_devices):
    size = np.array(SEED_TABLE)
    each = -(-len(size) // num_devices)
    at_once = schedule.balanced(each, at_once)
    slots = schedule.deal(size, num_devices, -(-each // at_once) * at_once)
    axis = parallel.ClientAxis(None, slots, at_once)
    steps = -(-size // 64)
    processed = axis.plan(steps, 50).processed * 64
    assert 1 <= processed / size.sum() < 1.2


def test_deal_balances_images_and_numbers():
    slots = schedule.deal(np.array(SEED_TABLE), 2, 5)
    assert sorted(slots.reshape(-1)) == list(range(10))
    load = np.array(SEED_TABLE)[slots].sum(axis=1)
    assert abs(load[0] - load[1]) < 0.1 * load.sum()


@pytest.mark.parametrize(
    ("count", "at_most", "size"), [(10, 4, 4), (10, 3, 3), (9, 6, 5), (1000, 300, 250)]
)
def test_groups_are_balanced(count, at_most, size):
    assert schedule.balanced(count, at_most) == size


def test_lanes_by_hand():
    for steps, at_once, expected in (
        ([1, 1, 1], 3, 3),
        ([1, 1, 1], 2, 2),
        ([10, 1, 1], 3, 1),
        ([10, 5, 5], 3, 2),
        ([0, 0], 2, 1),
        ([], 2, 1),
    ):
        assert schedule.num_lanes(np.array(steps, int), at_once) == expected


@pytest.mark.parametrize(
    ("steps", "lanes", "length"),
    [
        ([7, 2, 3], 1, 7),
        ([7, 2, 3], 2, 7),
        ([4, 4, 4], 2, 6),
        ([4, 4, 5], 2, 7),
        ([1, 1, 1], 3, 1),
        ([0, 0, 0], 2, 0),
        ([0, 0], 1, 0),
        ([], 1, 0),
    ],
)
def test_length_of_a_plan(steps, lanes, length):
    plan = schedule.DevicePlan(np.array(steps, int), lanes, 2)
    assert plan.length == length
    done, processed = run(plan, len(steps), 2)
    np.testing.assert_array_equal(done, steps)
    assert processed == plan.processed


def test_short_windows_reserve_few_pieces():
    plan = schedule.DevicePlan(np.full(40, 10), 2, 10)
    assert plan.capacity <= 3


def test_stacked_pieces_are_filled_up():
    one = schedule.Pieces(
        client=np.array([[4, 5]]),
        first=np.array([[6, 7]]),
        count=np.array([8]),
        begin=np.array([3]),
    )
    other = schedule.Pieces(
        client=np.array([[0, -1], [1, 2]]),
        first=np.array([[3, 0], [1, 1]]),
        count=np.array([2, 9]),
        begin=np.array([5, 7]),
    )
    found = schedule.stack([one, other], 3)
    nobody = [-1, -1]
    np.testing.assert_array_equal(
        found.client, [[[4, 5], nobody, nobody], [[0, -1], [1, 2], nobody]]
    )
    np.testing.assert_array_equal(
        found.first, [[[6, 7], [0, 0], [0, 0]], [[3, 0], [1, 1], [0, 0]]]
    )
    np.testing.assert_array_equal(found.count, [[8, 0, 0], [2, 9, 0]])
    np.testing.assert_array_equal(found.begin, [[3, 0, 0], [5, 7, 0]])
