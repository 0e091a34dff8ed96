"""Tables of README and docs say what the benchmarks measured and print today."""

import functools
import pathlib
import re

import pytest

from benchmarks import accuracy, ahead, private_accuracy, timing
from mosaic_jax.core import files

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"
PRIVACY = ROOT / "docs" / "privacy.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
Table = dict[str, dict[str, str]]


def parsed(lines) -> Table:
    """The cells of a Markdown table by the first one of their row and their head."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def documented(page: pathlib.Path, before: str) -> Table:
    """The first table of a page after the words `before`, which are there once."""
    _, text = page.read_text().split(before)
    found = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert found, before
    return parsed(found[0].splitlines())


@functools.cache
def measured(name: str, alpha: float) -> list[accuracy.Cell]:
    """Cells of benchmarks.accuracy with the settings of today."""
    path = timing.RESULTS / f"accuracy_{name.replace(':', '_')}.json"
    found = [
        cell
        for cell in timing.kept(path)
        if cell["alpha"] == alpha
        and accuracy.is_of_today(
            cell, accuracy.study_of(name, alpha, cell["seed"], cell["method"])
        )
    ]
    # Such a table is measured anew, or docs tell the commit that it is of.
    assert found, f"{name}, alpha {alpha}: nothing was measured with today's settings"
    return found


@pytest.mark.parametrize(
    ("heading", "name", "alpha"),
    [
        ("## Digits, alpha 0.01\n", "digits", 0.01),
        ("## Digits, alpha 0.1\n", "digits", 0.1),
        ("## Digits, alpha 1.0\n", "digits", 1.0),
        ("## Fashion-MNIST, alpha 0.01\n", "fashion_mnist:small", 0.01),
    ],
)
def test_accuracies_are_those_that_were_measured(heading, name, alpha):
    printed = parsed(accuracy.table(measured(name, alpha)).splitlines())
    found = documented(RESULTS, heading)
    assert found.keys() == printed.keys()
    for method, row in found.items():
        assert row == {head: printed[method][head] for head in row}, method


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ('; "ended" is how many', "digits"),
        ("\nFashion-MNIST, 32 x 32, 5,400 images (`", "fashion_mnist:small"),
    ],
)
def test_private_accuracies_are_those_that_were_measured(before, name):
    cells = timing.kept(private_accuracy.PATH)
    cells = [cell for cell in cells if private_accuracy.is_of_today(cell)]
    here = [cell for cell in cells if cell["name"] == name]
    printed = parsed(private_accuracy.table(here).splitlines())
    assert documented(PRIVACY, before) == printed


def test_the_readmes_table_is_that_of_the_results():
    found = documented(ROOT / "README.md", "\n## What it finds\n")
    assert len(found) == 2
    for data, row in found.items():
        name = {"d": "digits", "F": "fashion_mnist:small"}[data[0]]
        cells = measured(name, 0.01)
        printed = parsed(accuracy.table(cells).splitlines())
        mosaic = printed["mosaic"]
        assert row["FedAvg"] == printed["fedavg"]["final"]
        assert row["Mosaic: teacher"] == mosaic["teacher"]
        assert row["student"] == mosaic["distilled"]
        assert row["after its last rounds"] == mosaic["final"]
        # Of those with the same seeds.
        others = [
            row["final"]
            for method, row in printed.items()
            if method != "mosaic" and row["seeds"] == mosaic["seeds"]
        ]
        best = max(others, key=lambda cell: float(cell.split()[0]))
        assert row["best other"].startswith(f"{best} ("), data


def compiled(name: str):
    """What benchmarks.ahead kept of a study."""
    return files.read_json(timing.RESULTS / f"ahead_{name}.json")["result"]


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("\n`cifar10_mosaic`, bfloat16, one H100", "cifar10_mosaic_h100"),
        ("\nThe same study on one TPU v5e", "cifar10_mosaic_v5e"),
    ],
)
def test_compiled_programs_are_those_that_were_counted(before, name):
    study = compiled(name)
    rows = [map(str, ahead.shown(loop)) for loop in study["loops"]]
    printed = {
        name: dict(zip(ahead.HEADER[1:], row, strict=True)) for name, *row in rows
    }
    total = {
        "memory, GB": f"{study['memory_bytes'] / 1e9:.2f}",
        "s": f"{study['total_seconds']:.1f}",
    }
    for loop, row in documented(PERFORMANCE, before).items():
        expected = total if loop == "study" else printed[loop]
        assert row == {head: expected.get(head, "") for head in row}, loop


def test_compiled_studies_are_those_that_were_counted():
    found = {}
    for name, row in documented(PERFORMANCE, "\nWhole studies, `--config").items():
        config, _, where = name.partition(", ")
        end = {"": "h100", "`--devices 8`": "h100_8", "one v5e": "v5e"}[where]
        found[f"{config.replace(':', '_')}_{end}"] = row
    kept = {path.stem[6:] for path in timing.RESULTS.glob("ahead_*.json")}
    assert found.keys() == kept
    for name, row in found.items():
        study = compiled(name)
        assert row == {
            "minutes": f"{study['total_seconds'] / 60:.2f}",
            "memory of a device, GB": f"{study['memory_bytes'] / 1e9:.2f}",
        }, name
