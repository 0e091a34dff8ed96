"""What benchmarks rely on: rivals in processes and environments of their own."""

import dataclasses
import importlib
import pathlib
import sys

import numpy as np
import pytest

from benchmarks import (
    accuracy,
    agreement,
    environments,
    private_accuracy,
    search,
    timing,
    worker,
)
from mosaic_jax.cli import config_files
from mosaic_jax.core import schema
from mosaic_jax.run import methods, settings

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def here(monkeypatch):
    """A worker of this module, in this environment."""
    monkeypatch.setattr(environments, "python", lambda name: sys.executable)
    with worker.Worker("pfl", "tests.test_benchmarks") as result:
        yield result


def double(arrays, times):
    """Called in the worker."""
    print("a library that prints\n")
    return {name: array * 2 * times for name, array in arrays.items()}


def end(arrays):
    """Called in the worker."""
    sys.exit(3)


def test_a_worker_answers_with_arrays(here):
    arrays = {"weights/a.b": np.arange(6.0).reshape(2, 3), "n": np.array(7)}
    for times in (1, 3):
        found = here.call("double", arrays, times=times)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], 2 * times * array)
    assert here.call("double", times=1) == {}


def test_a_worker_that_ends_is_told(here):
    for _ in range(2):
        with pytest.raises(SystemExit, match="pfl: the worker ended with code 3;"):
            here.call("end")


def test_a_missing_or_changed_environment_is_told(tmp_path, monkeypatch):
    wanted = tmp_path / "toy.txt"
    wanted.write_text("# nothing\n")
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "REQUIREMENTS", {"toy": wanted})
    with pytest.raises(SystemExit, match=r"python -m benchmarks\.environments toy"):
        environments.python("toy")
    (tmp_path / "toy").mkdir()
    with pytest.raises(SystemExit, match="missing or out of date"):
        environments.python("toy")
    (tmp_path / "toy" / "installed.txt").write_text("# nothing\n")
    assert environments.python("toy") == tmp_path / "toy" / "bin" / "python"
    wanted.write_text("# something else\n")
    with pytest.raises(SystemExit, match="missing or out of date"):
        environments.python("toy")


def test_rivals_have_environments():
    rivals = importlib.import_module("benchmarks.round").RIVALS
    peers = {pair.peer for pair in agreement.PAIRS}
    assert {*rivals.values(), *peers} == environments.REQUIREMENTS.keys()


@pytest.mark.parametrize(
    ("ours", "theirs", "within"),
    [
        ((0.80, 0.84), (0.81, 0.85), "yes"),
        ((0.80, 0.84), (0.90, 0.94), "no"),
        ((0.80, 0.80), (0.80, 0.90), "yes"),  # the larger deviation counts
        ((0.80, 0.80), (0.81, 0.81), "no"),
        ((0.80,), (0.81,), "-"),
    ],
)
def test_means_agree_within_the_larger_deviation(ours, theirs, within):
    assert agreement.agree(ours, theirs) == within
    assert agreement.agree(theirs, ours) == within


def _agreement_rows(pair, **changed):
    row = {"name": pair.name, "peer": pair.peer, "distance": 1e-6}
    row |= {"seconds": [0.1, 0.3], "their_seconds": [2.0, 4.0]}
    accuracies = ((0.5, 0.52), (0.6, 0.58))
    rows = [
        row | {"seed": i, "ours": a, "theirs": b} for i, (a, b) in enumerate(accuracies)
    ]
    rows[1]["distance"] = 2e-6
    if pair.as_peer:
        rows = [one | {"as_peer": one["theirs"]} for one in rows]
    return [one | changed for one in rows]


def test_a_table_of_agreement_has_a_line_for_each_pair_and_its_notes():
    rows = [row for pair in agreement.PAIRS for row in _agreement_rows(pair)]
    lines = agreement.table(rows, rows).splitlines()
    first = "| FedAvg | pfl | 0, 1 | 55.0 ± 7.1 | the same | 55.0 ± 4.2 | yes |"
    assert lines[2] == f"{first} 1e-06 to 2e-06 | 0.200 | 3.000 |"
    told = [pair for pair in agreement.PAIRS if pair.told]
    assert [line[:3] for line in lines[2 + len(agreement.PAIRS) :] if line] == [
        f"({i})" for i in range(1, len(told) + 1)
    ]
    for i, pair in enumerate(told, 1):
        assert any(
            f"| {agreement.NAMES[pair.name]} | {pair.peer} ({i}) |" in line
            and line.count("55.0 ± 4.2") == 2
            for line in lines
        )
    # Seconds may come from runs of another length, or not be there yet.
    short = {"seconds": [7.0], "their_seconds": [8.0]}
    timed = _agreement_rows(agreement.PAIRS[0], **short)
    assert agreement.table(rows[:2], timed).endswith("| 7.000 | 8.000 |")
    assert agreement.table(rows[:2], []).endswith("| - | - |")


def test_pairs_are_of_known_algorithms_and_tell_what_differs():
    assert {pair.name for pair in agreement.PAIRS} == agreement.OURS.keys()
    assert agreement.NAMES.keys() == agreement.OURS.keys()
    for pair in agreement.PAIRS:
        ours = agreement.OURS[pair.name]
        assert (pair.as_peer is None) == (pair.told == "")
        if pair.as_peer:  # the definition alone is other, not a setting
            assert isinstance(pair.as_peer, type(ours))
            assert dataclasses.asdict(pair.as_peer) == dataclasses.asdict(ours)


def test_other_weights_than_a_peers_are_an_error():
    rows = _agreement_rows(agreement.PAIRS[0])
    agreement.check(rows)
    for distance in (1.0, float("nan")):
        far = _agreement_rows(agreement.PAIRS[0], distance=distance)
        with pytest.raises(
            AssertionError, match="fedavg of pfl, seed 0: weights differ"
        ):
            agreement.check([*rows, *far])


@pytest.mark.parametrize("name", methods.COMPARED)
def test_every_method_has_had_the_same_search(name):
    if name in ("fedbn", "fedavg_decay"):  # nothing of their own to set
        assert name not in search.TRIED
        return
    base = settings.from_mapping(config_files.load("digits_mosaic").to_dict())
    config = methods.with_method(base, name)
    tried = search.TRIED[name]
    assert len({tuple(fields.values()) for fields in tried}) == 4
    for fields in tried:
        changed = methods.changed(schema.to_mapping(config), fields)
        settings.from_mapping(changed)
    assert sum(fields.items() <= schema.flat(config).items() for fields in tried) == 1


def test_rows_of_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "rows.json"
    assert timing.kept(path) == []
    for seed, value in ((0, 1), (1, 2), (0, 3)):
        row = {"seed": seed, "fields": {"a.b": 0.1}, "value": value}
        timing.keep(path, row, "seed", "fields")
    assert [(row["seed"], row["value"]) for row in timing.kept(path)] == [
        (1, 2),
        (0, 3),
    ]


def test_a_cell_is_stale_when_a_field_that_its_study_reads_has_changed():
    config = accuracy.study_of("digits", 0.01, 0, "fedprox")
    cell = {"settings": accuracy.read_fields(config)}

    def is_of_today(**changed):
        mapping = methods.changed(schema.to_mapping(config), changed)
        return accuracy.is_of_today(cell, settings.from_mapping(mapping))

    assert is_of_today()
    assert is_of_today(**{"methods.dense.width": 3, "log.every_steps": 3})
    assert not is_of_today(**{"methods.fedprox.mu": 3.0})
    assert not is_of_today(**{"distill.steps": 7})
    another = accuracy.study_of("digits", 0.01, 0, "fedprox[distill.steps=7]")
    assert not accuracy.is_of_today(cell, another)
    # A field that came later counts as at its default; one that went does not.
    del cell["settings"]["local.clip_norm"]
    assert is_of_today()
    assert not is_of_today(**{"local.clip_norm": 1.0})
    cell["settings"]["local.former"] = 1
    assert not is_of_today()


def test_folders_of_methods_are_as_many_as_methods(monkeypatch, tmp_path):
    found = []

    class Nothing:
        def __init__(self, config, workdir, **_):
            found.append(workdir)

        def run(self):
            raise InterruptedError

    monkeypatch.setattr(accuracy, "Experiment", Nothing)
    names = [f"fedavg[local.learning_rate={rate}]" for rate in ("1e-3", "1e+3", "1e3")]
    for name in names:
        with pytest.raises(InterruptedError):
            accuracy.measure(accuracy.study_of("digits", 1.0, 0, name), name, tmp_path)
    assert len(set(found)) == len(names)
    assert {workdir.parent for workdir in found} == {tmp_path}


def test_stale_cells_are_named_and_left_out_of_tables():
    config = accuracy.study_of("digits", 0.01, 0, "fedavg")
    today = {"fedavg of seed 0": config, "fedavg of seed 1": config}
    cells = [
        {
            "alpha": 0.01,
            "method": "fedavg",
            "seed": seed,
            "settings": accuracy.read_fields(config) | {"local.learning_rate": rate},
            "test": {"final": 0.5},
            "split": "",
            "rounds": 46,
            "bytes": {"up": 2e6, "down": 3e6},
            "flops": 1e12,
            "server": "none",
            "processor": "Abacus",
            "date": "2026-01-01",
        }
        for seed, rate in enumerate((config.local.learning_rate, 7.0))
    ]
    head, stale, _, *table = accuracy.told(cells, today).splitlines()
    assert head == "alpha 0.01; Abacus, 2026-01-01"
    assert stale == "of other settings, to be measured anew: fedavg of seed 1"
    assert table[2].startswith("| fedavg | 0 | 50.0 |")


def test_tables_of_accuracy_have_means_and_refuse_unequal_terms():
    def cell(method, seed, final, **others):
        return {
            "method": method,
            "seed": seed,
            "test": {"final": final},
            "split": f"of seed {seed}",
            "rounds": 46,
            "bytes": {"up": 2e6, "down": 3e6},
            "flops": 1e12,
            "server": "none",
        } | others

    cells = [cell("mosaic", 1, 0.9), cell("mosaic", 0, 0.8), cell("fedavg", 0, 0.5)]
    head, _, *rows = accuracy.table(cells).splitlines()
    assert head.startswith("| method | seeds | final | MB up | MB down |")
    assert rows[0].startswith("| fedavg | 0 | 50.0 | 2.0 | 3.0 |")
    assert rows[1].startswith("| mosaic | 0, 1 | 85.0 ± 7.1 | 2.0 | 3.0 |")
    for name, value in (("split", "another"), ("rounds", 45)):
        with pytest.raises(AssertionError, match=f"seed 0: unequal {name}"):
            accuracy.table([*cells, cell("feddf", 0, 0.5, **{name: value})])


def test_studies_that_privacy_stops_are_counted_and_have_no_accuracy():
    def cell(seed, epsilon, **test):
        key = {"name": "digits", "seed": seed, "method": "mosaic", "epsilon": epsilon}
        return key | {"test": test}

    cells = [
        cell(0, "inf", teacher=0.9, final=0.94),
        cell(1, "inf", teacher=0.8, final=0.96),
        cell(0, "8.0", teacher=0.1, final=0.12),
        cell(1, "8.0"),
    ]
    assert private_accuracy.table(cells).splitlines() == [
        "| epsilon | ended | inf | 8.0 | 3.0 | 1.0 |",
        "|---|---|---|---|---|---|",
        "| mosaic, teacher | 2, 1, 0, 0 | 85.0 ± 7.1 | 10.0 |  |  |",
        "| mosaic, final | 2, 1, 0, 0 | 95.0 ± 1.4 | 12.0 |  |  |",
    ]


def test_what_was_measured_at_an_epsilon_is_of_todays_settings():
    cells = timing.kept(private_accuracy.PATH)
    assert cells and all(map(private_accuracy.is_of_today, cells))
    old = cells[0] | {"settings": cells[0]["settings"] | {"local.steps": 99}}
    assert not private_accuracy.is_of_today(old)


@pytest.mark.parametrize("method", private_accuracy.METHODS)
def test_private_studies_of_the_table_are_valid(method):
    found = private_accuracy.study_of("digits", 0, method, 3.0)
    assert found.privacy.epsilon == 3.0
    plain = private_accuracy.study_of("digits", 0, method, float("inf"))
    assert not plain.privacy.of_images
