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
    def fields(method, **changed):
        config = accuracy.study("digits", 0.01, 0, method)
        mapping = methods.changed(schema.to_mapping(config), changed)
        return accuracy.set_fields(settings.from_mapping(mapping))

    prox = fields("fedprox")
    assert fields("fedprox[distill.steps=7]") == prox | {"distill.steps": 7}
    assert fields("fedprox", **{"methods.dense.width": 3}) == prox
    for name, value in (("methods.fedprox.mu", 3.0), ("distill.steps", 7)):
        assert fields("fedprox", **{name: value}) == prox | {name: value}


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
