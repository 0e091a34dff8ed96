"""Splits: the published table, and what every split must keep."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_jax.core import errors, files
from mosaic_jax.data import flower, partition
from tests import golden

LABELS = np.repeat(np.arange(10), 100)
CLASSES = np.unique(LABELS)
# Settings of the splits besides alpha, and whose each image is.
FIELDS = {"iid_share": 0.5, "classes_per_client": 3, "sigma": 1.0}
FIELDS["group"] = np.arange(len(LABELS)) % 25


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
    mode=st.sampled_from(list(partition.MODES)),
    num_clients=st.integers(1, 20),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 2**31 - 1),
)
def test_parts_are_disjoint_and_reproducible(mode, num_clients, alpha, seed):
    args = {"mode": mode, "num_clients": num_clients, "alpha": alpha, "seed": seed}
    args |= FIELDS
    parts = partition.split(LABELS, **args)
    together = np.concatenate(parts)
    assert len(parts) == num_clients
    assert len(np.unique(together)) == len(together)
    if mode == "pathological":
        taken = min(len(CLASSES), num_clients * FIELDS["classes_per_client"])
        assert len(together) == taken * 100
    elif mode == "by_column":
        assert len(together) == num_clients * 40
    elif mode != "dirichlet_balanced":
        assert len(together) == len(LABELS)
    if mode == "dirichlet_unbalanced":
        assert min(map(len, parts)) >= partition.MIN_SIZE
    if mode == "dirichlet_balanced":
        assert {len(part) for part in parts} == {len(LABELS) // num_clients}
    assert partition.digest(parts) == partition.digest(partition.split(LABELS, **args))


def test_clients_by_column():
    """Each client has the images of one group, whatever the groups are called."""
    group = np.array(["b", "a", "c", "b", "a", "b"])
    given = {"mode": "by_column", "seed": 0, "group": group}
    parts = partition.split(np.zeros(6, int), num_clients=3, **given)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 3, 5], [2]]
    # Fewer clients are drawn among the groups, others by other seeds.
    drawn = {
        "".join(group[part[0]] for part in parts)
        for seed in range(9)
        for parts in [
            partition.split(np.zeros(6, int), num_clients=2, **given | {"seed": seed})
        ]
    }
    assert drawn == {"ab", "ac", "bc"}
    told = "data.num_clients = 4: must be <= 3, the number of groups among"
    with pytest.raises(errors.DataError, match=told):
        partition.split(np.zeros(6, int), num_clients=4, **given)
    told = "data.split = 'by_column': needs to know whose each training image is"
    with pytest.raises(errors.DataError, match=told):
        partition.split(np.zeros(6, int), num_clients=3, **given | {"group": None})


class Halves:
    """A partitioner as flwr-datasets has them: those of a group stay together."""

    num_partitions = 2

    def load_partition(self, number):
        whose = [whose % 2 for whose in self.dataset["group"]]
        return self.dataset.select(np.flatnonzero(np.array(whose) == number))


def test_partitioners_of_flower():
    pytest.importorskip("datasets")
    one = Halves()
    assert flower.is_partitioner(one) and not flower.is_partitioner(Halves.__call__)
    deal = flower.of_partitioner(one)
    parts = deal(np.arange(6), 2, None, group=np.array([1, 2, 3, 4, 5, 6]))
    assert [part.tolist() for part in parts] == [[1, 3, 5], [0, 2, 4]]
    assert not hasattr(one, "dataset")
    told = "data.num_clients = 3: must be 2, the partitions of the Halves"
    with pytest.raises(errors.DataError, match=told):
        deal(np.arange(6), 3, None)


@pytest.mark.filterwarnings("ignore")
def test_the_partitioners_that_flower_ships():
    """Theirs on a table of their own, and through this library, are the same."""
    flwr = pytest.importorskip("flwr_datasets.partitioner")
    import datasets

    makers = [
        lambda: flwr.IidPartitioner(num_partitions=5),
        lambda: flwr.DirichletPartitioner(5, "label", alpha=0.5, min_partition_size=9),
        lambda: flwr.PathologicalPartitioner(5, "label", num_classes_per_partition=2),
        lambda: flwr.ShardPartitioner(5, "label", num_shards_per_partition=2),
        lambda: flwr.NaturalIdPartitioner("group"),
    ]
    group = np.arange(len(LABELS)) % 5
    for make in makers:
        theirs = make()
        table = {"label": LABELS, "group": group, "index": np.arange(len(LABELS))}
        theirs.dataset = datasets.Dataset.from_dict(table)
        parts = flower.of_partitioner(make())(LABELS, 5, None, group=group)
        for i, part in enumerate(parts):
            assert part.tolist() == theirs.load_partition(i)["index"][:]


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
    with pytest.raises(errors.ConfigError, match=r"data.split = 'other': unknown, kno"):
        split(mode="other")
    told = r"data.classes_per_client = 11: must be <= 10, the number of classes"
    with pytest.raises(errors.DataError, match=told):
        split(mode="pathological", classes_per_client=11)
    told = r"data.classes_per_client = 5: must be <= 3 for data.split = 'shards'"
    with pytest.raises(errors.DataError, match=told):
        split(mode="shards", classes_per_client=5)


def test_tries_are_bounded(monkeypatch):
    monkeypatch.setattr(partition, "MAX_TRIES", 3)
    labels = np.repeat(np.arange(2), 500)
    with pytest.raises(errors.DataError, match=r"data.alpha = 0.0001: .* in 3 tries"):
        partition.split(
            labels, mode="dirichlet_unbalanced", num_clients=90, alpha=1e-4, seed=0
        )


def drawn(labels=LABELS, **changes):
    args = {"mode": "iid", "num_clients": 5, "alpha": 1.0, "seed": 0} | changes
    return partition.split(labels, **args)


def test_one_image_for_each_client():
    assert [len(part) for part in drawn(LABELS[::100], num_clients=10)] == [1] * 10


def test_smallest_client_of_many_splits():
    """Redrawn until each has ten images, not nine and not eleven."""
    labels = np.repeat(np.arange(5), 20)
    smallest = [
        min(map(len, drawn(labels, mode="dirichlet_unbalanced", seed=seed)))
        for seed in range(60)
    ]
    assert min(smallest) == 10


def test_a_fair_share_of_ten_images_can_be_met():
    labels = np.zeros(20, int)
    parts = drawn(labels, mode="dirichlet_unbalanced", num_clients=2, alpha=1e6)
    assert [len(part) for part in parts] == [10, 10]


def test_a_client_that_holds_its_share_gets_no_more(monkeypatch):
    """Either class goes to one client, and the second to the other: the first try."""
    monkeypatch.setattr(partition, "MAX_TRIES", 1)
    labels, met = np.repeat(np.arange(2), 50), 0
    for seed in range(20):
        try:
            parts = drawn(
                labels,
                mode="dirichlet_unbalanced",
                num_clients=2,
                alpha=0.01,
                seed=seed,
            )
        except errors.DataError:
            continue  # All mass on the full client, or a class in two parts.
        counts = partition.label_counts(labels, parts, 2)
        met += sorted(counts.max(1)) == [50, 50]
    assert met > 5


@pytest.mark.parametrize("seed", range(5))
def test_all_mass_on_full_clients_is_drawn_again(seed):
    labels = np.repeat(np.arange(2), 50)
    parts = drawn(
        labels, mode="dirichlet_unbalanced", num_clients=2, alpha=1e-4, seed=seed
    )
    counts = partition.label_counts(labels, parts, 2)
    assert sorted(counts.tolist()) == [[0, 50], [50, 0]]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_clients", 0, r"data.num_clients = 0: must be in \[1, inf\]"),
        ("alpha", 0.0, r"data.alpha = 0.0: must be in \["),
        ("alpha", np.inf, r"data.alpha = inf: must be in \["),
        ("alpha", np.nan, r"data.alpha = nan: must be in \["),
        ("seed", -1, r"seed of the split = -1: must be in \[0, 4294967295\]"),
        ("seed", 2**32, r"seed of the split = 4294967296: must be in \["),
    ],
)
def test_numbers_out_of_range(name, value, told):
    with pytest.raises(errors.DataError, match=told):
        drawn(**{name: value})


def test_numbers_at_the_ends_of_their_ranges():
    for changes in ({"num_clients": 1}, {"seed": 0}, {"seed": 2**32 - 1}):
        assert len(np.concatenate(drawn(**changes))) == len(LABELS)


def test_balanced_clients_weigh_classes_not_images():
    labels = np.repeat(np.arange(2), [900, 100])
    parts = drawn(labels, mode="dirichlet_balanced", num_clients=20, alpha=1e6)
    first = partition.label_counts(labels, parts, 2)[0]
    # Half of 50 each, within four standard deviations.
    assert abs(first[1] - 25) < 4 * 12.5**0.5


@pytest.mark.parametrize("seed", range(5))
def test_balanced_clients_fill_up_from_classes_of_no_weight(seed):
    labels = np.repeat(np.arange(2), [30, 10])
    parts = drawn(
        labels, mode="dirichlet_balanced", num_clients=2, alpha=1e-3, seed=seed
    )
    assert [len(part) for part in parts] == [20, 20]


@pytest.mark.parametrize(
    ("mode", "num_clients", "alpha", "expected"),
    [
        ("iid", 3, 1.0, "ce470152e66d6b16"),
        ("dirichlet_unbalanced", 10, 0.1, "973e5a1f4dca1da4"),
        ("dirichlet_unbalanced", 20, 0.5, "583a7a0b1b40c9ac"),
        ("dirichlet_balanced", 10, 0.1, "b734693887eb8b2c"),
    ],
)
def test_a_seed_keeps_its_split(mode, num_clients, alpha, expected):
    """Saved studies rely on it."""
    parts = drawn(mode=mode, num_clients=num_clients, alpha=alpha, seed=7)
    assert partition.digest(parts)[:16] == expected


def read(tmp_path, content, num_clients=2):
    path = tmp_path / "split.csv"
    path.write_text(content)
    return partition.read(path, num_images=12, num_clients=num_clients)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("10", "9", "2"), [2, 1, 0]),
        (("b", "a", "c"), [1, 0, 2]),
        (("10", "9", "x"), [0, 1, 2]),
    ],
)
def test_clients_of_a_csv_in_the_order_of_their_names(tmp_path, names, order):
    rows = [f"{name},{i}" for i, name in enumerate(names)]
    parts = read(tmp_path, "\n".join(["client,index", *rows]), num_clients=3)
    assert [int(part[0]) for part in parts] == order


@pytest.mark.parametrize(
    "content", ["", "client,index\n", "client,number\n0,1\n", "a,b\n0,1\n1,2\n"]
)
def test_a_csv_without_its_columns(tmp_path, content):
    with pytest.raises(
        errors.DataError, match="must have the columns client and index"
    ):
        read(tmp_path, content)


def test_a_csv_of_one_row(tmp_path):
    assert read(tmp_path, "index,client\n11,0\n", num_clients=1)[0].tolist() == [11]


@pytest.mark.parametrize(("index", "told"), [(-1, "-1..3"), (12, "3..12")])
def test_image_numbers_out_of_range(tmp_path, index, told):
    with pytest.raises(errors.DataError, match=rf"{told}: must be 0\.\.11"):
        read(tmp_path, f"client,index\n0,3\n1,{index}\n")


def test_a_split_of_a_run_tells_when_it_was_changed(tmp_path):
    path = tmp_path / "split.json"
    files.write_json(path, {"clients": [[4, 1], [2]]})
    parts = partition.read(path, num_images=5, num_clients=2)
    assert [part.tolist() for part in parts] == [[4, 1], [2]]
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"clients": [[4, 1], [3]]}))
    with pytest.raises(errors.DataError, match="the checksum does not match"):
        partition.read(path, num_images=5, num_clients=2)


# --- splits by classes, sizes and shares


def classes_of(parts):
    return [set(LABELS[part]) for part in parts]


@pytest.mark.parametrize("num_clients", [4, 10, 37])
def test_pathological_clients_have_just_so_many_classes(num_clients):
    parts = drawn(mode="pathological", num_clients=num_clients, classes_per_client=3)
    held = classes_of(parts)
    assert {len(classes) for classes in held} == {3}
    holders = [sum(k in classes for classes in held) for k in CLASSES]
    assert max(holders) - min(holders) <= 1
    counts = partition.label_counts(LABELS, parts, 10)
    for k in CLASSES:
        each = counts[counts[:, k] > 0, k]
        assert each.max() - each.min() <= 1


def test_shards_are_those_of_the_sorted_images():
    parts = drawn(mode="shards", num_clients=10, classes_per_client=2)
    assert {len(part) for part in parts} == {100}
    # Twenty shards, two of each class.
    assert max(map(len, classes_of(parts))) <= 2
    assert {np.unique(LABELS[part], return_counts=True)[1].min() for part in parts} <= {
        50,
        100,
    }


def test_sizes_are_lognormal():
    parts = drawn(np.zeros(200_000, int), mode="quantity", num_clients=400, sigma=0.7)
    size = np.log([len(part) for part in parts])
    assert abs(size.std() - 0.7) < 0.1 and abs(((size - size.mean()) ** 3).mean()) < 0.1
    even = drawn(mode="quantity", num_clients=8, sigma=0.0)
    assert {len(part) for part in even} == {125}
    assert min(map(len, drawn(mode="quantity", num_clients=50, sigma=3.0))) == 10


def test_a_share_is_dealt_evenly():
    def spread(iid_share):
        parts = drawn(
            mode="dirichlet_mixed", alpha=0.01, iid_share=iid_share, num_clients=10
        )
        counts = partition.label_counts(LABELS, parts, 10)
        return counts.std(axis=0).mean(), counts.min()

    assert spread(1.0)[0] < 4 < spread(0.5)[0] < 20 < spread(0.0)[0]
    assert spread(0.8)[1] >= 2


# --- a user's own


def halves(labels, num_clients, np_rng, *, alpha):
    """Every second image for each client; `alpha` is a setting that it names."""
    assert (num_clients, alpha) == (2, 0.3)
    return [np.arange(0, len(labels), 2), list(range(1, len(labels), 2))]


OWN = "tests.data.test_partition"


def test_a_function_of_the_users():
    args = {"mode": f"{OWN}:halves", "num_clients": 2, "seed": 0} | FIELDS
    parts = partition.split(LABELS, alpha=0.3, **args)
    assert [part[:2].tolist() for part in parts] == [[0, 2], [1, 3]]


def broken(labels, num_clients, np_rng):
    return labels["no"]


def floats(labels, num_clients, np_rng):
    return [np.array([0.5])] * num_clients


def twice(labels, num_clients, np_rng):
    return [np.array([7])] * num_clients


def one_short(labels, num_clients, np_rng):
    return [np.array([i]) for i in range(num_clients - 1)]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("broken", "IndexError: only integers"),
        ("floats", r"client 0 has float64 of shape \(1,\): must have image numbers"),
        ("twice", "image 7 is there 3 times"),
        ("one_short", "has 2 clients: must be data.num_clients = 3"),
    ],
)
def test_a_function_of_the_users_that_is_wrong(name, told):
    with pytest.raises(errors.DataError, match=f"data.split = '{OWN}:{name}': {told}"):
        partition.split(LABELS, mode=f"{OWN}:{name}", num_clients=3, seed=0)


# --- test images for each client


def test_own_test_sets_have_the_clients_classes():
    counts = np.array([[30, 10, 0], [0, 0, 7], [1, 1, 1]])
    label = np.repeat(np.arange(3), 200)
    index = partition.own_test_sets(counts, label, seed=0)
    assert index.shape == (3, 200)
    found = partition.label_counts(label, list(index), 3)
    assert found.tolist() == [[150, 50, 0], [0, 0, 200], [67, 67, 66]]
    assert all(len(np.unique(row)) == 200 for row in index)


def test_own_test_sets_of_classes_with_few_test_images():
    label = np.array([0] * 3 + [1] * 97)
    index = partition.own_test_sets(np.array([[5, 0], [5, 5]]), label, seed=0)
    assert index.shape == (2, 100)
    assert sorted(np.bincount(index[0])) == [33, 33, 34]
    told = "data.client_test = 'own': client 0 has no class of which there are test"
    with pytest.raises(errors.DataError, match=told):
        partition.own_test_sets(np.array([[0, 0, 5]]), label, seed=0)
