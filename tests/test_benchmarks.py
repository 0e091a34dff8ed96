"""What benchmarks rely on: rivals in processes and environments of their own."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

from benchmarks import accuracy, environments, search, timing, worker
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
    assert set(rivals.values()) == environments.REQUIREMENTS.keys()


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
