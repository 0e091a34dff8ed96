"""report.html of one run: what happened, in one file.

Besides what every study has, it shows what the stages say of themselves: their models,
headline numbers, findings on clients, and sections. It knows none of them by name.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mosaic_jax.core import files
from mosaic_jax.report import blocks, figures, glossary, headline, html, privacy, runs
from mosaic_jax.report.headline import OWN
from mosaic_jax.report.html import FigureFolder
from mosaic_jax.report.runs import FINAL, SavedRun

# Up to here a table holds every client; past it, a search.
MOST_ROWS = 60
# Past this many clients, how their sizes spread is worth a picture.
MOST_SIZES = 25
# Of a row of a loop's history, what it is of.
NO_MEASURES = {"stage", "loop", "step", "time"}
# Models that no federated round measures, drawn as lines beside those that rounds do.
MARKS = ("teacher", "distilled", OWN)


def write(
    workdir: pathlib.Path,
    path: pathlib.Path | None = None,
    *,
    interactive: bool = False,
) -> pathlib.Path:
    """Write the page of a finished study, and its figures as PNG in figures/ beside it.

    Args:
      workdir: its run directory.
      path: of the page; None: report.html in the run directory.
      interactive: with charts in place of drawings, see `charts`; some megabytes.

    Returns:
      Where the page is.

    Raises:
      ConfigError: charts are asked for, and Plotly is not installed.
      DataError: its files are missing or damaged.
    """
    run = runs.read(workdir)
    path = path or workdir / "report.html"
    folder = FigureFolder(path.parent / "figures", interactive=interactive)
    sections = _sections(run, folder)
    terms = glossary.used("".join(sections.values()))
    if terms:
        sections["Terms"] = html.terms(terms)
    partition = run.summary.partition
    mode = partition["mode"]
    lead = (
        f"{partition['num_clients']} clients, split {mode}"
        + (f" at alpha {partition['alpha']}" if "dirichlet" in mode else "")
        + f", {run.summary.rounds} federated rounds"
    )
    text = html.page(run.title, lead, sections, headline.sentence(run))
    files.write_bytes(path, text.encode())
    return path


def _sections(run: SavedRun, folder: FigureFolder) -> dict[str, Markup]:
    """By title, in order; a stage may add to a section that every study has."""
    found = {
        "Accuracy": _accuracy(run, folder),
        "Training": _training(run, folder),
        "Classes": _classes(run, folder),
        "Clients": _clients(run, folder),
    }
    for title, body in _of_stages(run, folder).items():
        found[title] = found.get(title, Markup()) + body
    last = {"Costs": _costs(run, folder), "Settings and environment": _settings(run)}
    for title, body in last.items():
        found[title] = body + found.pop(title, Markup())
    return found


def _of_stages(run: SavedRun, folder: FigureFolder) -> dict[str, Markup]:
    """What stages show, by the title of the section; those of one title are joined."""
    shown: dict[str, list[tuple[blocks.Block, blocks.Pictures]]] = {}
    for stage, section in run.sections():
        pictures = run.pictures(stage)
        of_title = shown.setdefault(section.title, [])
        of_title += [(block, pictures) for block in section.blocks]
    return {title: blocks.section(pairs, folder) for title, pairs in shown.items()}


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "" if value is None else f"{100 * value:.2f} %"


def _accuracy(run: SavedRun, folder: FigureFolder) -> Markup:
    accuracies = run.summary.accuracies
    rows = [
        (
            glossary.model(model, run.settings),
            *(percent(found.get(model)) for found in accuracies.values()),
        )
        for model in accuracies["test"]
    ]
    table = html.table(["model", *accuracies], rows, "Accuracy of every model")
    drawn = html.side_by_side(*_curves(run, folder), *_rates(run, folder))
    return html.cards(_cards(run)) + privacy.told(run) + drawn + table + _headline(run)


def _training(run: SavedRun, folder: FigureFolder) -> Markup:
    """What every loop measured, but the accuracies, which other figures have."""
    parts = []
    for stage, record in run.records.items():
        for loop in dict.fromkeys(row["loop"] for row in record.history):
            rows = [row for row in record.history if row["loop"] == loop]
            names = [
                name
                for name in rows[-1].keys() - NO_MEASURES
                if not name.endswith("_accuracy") and all(name in row for row in rows)
            ]
            if not names or len(rows) < 2:
                continue
            lines = {
                name.replace("_", " "): [row[name] for row in rows]
                for name in sorted(names)
            }
            drawn = figures.progress(lines, [row["step"] for row in rows])
            caption = f"{glossary.stage(stage, run.settings)}: {loop}"
            parts.append(folder.add(f"training_{stage}_{loop}", drawn, caption))
    return html.side_by_side(*parts, small=True)


def _cards(run: SavedRun) -> dict[str, str]:
    """What is seen at a glance: of the stages' headline numbers those with a "card"."""
    summary = run.summary
    sent, test = sum(summary.communication_bytes["up"].values()), summary.test_accuracy
    model, title = FINAL, "the final model"
    if FINAL not in test and OWN in test:
        model, title = OWN, "the clients' own models"
    return {
        f"test accuracy of {title}": percent(test.get(model)),
        "MB sent by clients": f"{sent / 1e6:.1f}",
        "seconds": f"{sum(summary.seconds.values()):.0f}",
    } | {
        number["card"]: f"{number['mean']:.3f}"
        for number in summary.headline.values()
        if "card" in number
    }


def _headline(run: SavedRun) -> Markup:
    """Every headline number of the stages, behind a line that opens the table."""
    rows = [
        (name, interval(number), number["meaning"])
        for name, number in run.summary.headline.items()
    ]
    if not rows:
        return Markup()
    head = ["number", "value [95 %]", "what it means"]
    return html.folded(
        "Headline numbers of the stages", html.table(head, rows, "Headline numbers")
    )


def interval(number: Mapping[str, Any]) -> str:
    """The mean of a headline number with its confidence interval."""
    return f"{number['mean']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


def _curves(run: SavedRun, folder: FigureFolder) -> list[Markup]:
    """The global model over rounds, and over what was sent."""
    curve, test = run.curve(), run.summary.test_accuracy
    stages = list(dict.fromkeys(curve["stage"].tolist()))
    if not stages:
        return []

    def lines(axis: str, scale: float = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            glossary.model(stage, run.settings): (
                curve[axis][of_stage] / scale,
                curve["accuracy"][None, of_stage],
            )
            for stage in stages
            for of_stage in [curve["stage"] == stage]
        }

    marks = {name: test[name] for name in MARKS if name in test}
    return [
        folder.add(
            "accuracy",
            figures.curves(lines("round"), xlabel="federated round", marks=marks),
            "Test accuracy of the global model, or else the mean of the clients' own"
            " models, over federated rounds. Horizontal: the teacher, the student after"
            " distillation, or the mean of the clients' own models, where the method"
            " has them.",
        ),
        folder.add(
            "accuracy_bytes",
            figures.curves(lines("bytes", 1e6), xlabel="MB sent by clients"),
            "The same against what all clients had sent by then, generators,"
            " prototypes and label counts included.",
        ),
    ]


def _rates(run: SavedRun, folder: FigureFolder) -> list[Markup]:
    """Parts of the final model by their rate."""
    rates = run.rate_accuracy()
    if not rates:
        return []
    found = {rate: {"mean": value, "spread": 0.0} for rate, value in rates.items()}
    drawn = figures.rates({FINAL: found})
    caption = "Test accuracy of the parts of the final model that clients of each rate"
    return [folder.add("rates", drawn, f"{caption} hold.")]


def _classes(run: SavedRun, folder: FigureFolder) -> Markup:
    if FINAL not in run.predictions():
        return Markup()
    models = run.distinct_predictions()
    parts = [
        folder.add(
            "per_class",
            figures.per_class(
                {
                    glossary.model(name, run.settings): run.per_class(name)
                    for name in models
                }
            ),
            "Test accuracy within each class.",
        ),
        folder.add(
            "confusion",
            figures.heat(
                run.confusion().astype(float),
                xlabel="taken for",
                ylabel="class",
                label="test images",
                fmt=".0f",
            ),
            "Confusion of the final model: how often a class (row) was taken for"
            " another (column).",
        ),
    ]
    return html.side_by_side(*parts) + _teacher_and_student(run)


def _teacher_and_student(run: SavedRun) -> Markup:
    """On which images a distilled model and its teacher are right, where both are."""
    found = run.predictions()
    if "teacher" not in found or "distilled" not in found:
        return Markup()
    label = run.test_label
    teacher, student = (found[name] == label for name in ("teacher", "distilled"))
    both = [
        ("teacher right", np.mean(teacher & student), np.mean(teacher & ~student)),
        ("teacher wrong", np.mean(~teacher & student), np.mean(~teacher & ~student)),
    ]
    rows = [(name, *(percent(float(v)) for v in values)) for name, *values in both]
    agree = np.mean(found["teacher"] == found["distilled"])
    return html.paragraph(
        f"Teacher and distilled student answer alike on {percent(float(agree))} of the"
        " test images:"
    ) + html.table(
        ["share of the test images", "student right", "student wrong"],
        rows,
        "Teacher against student",
    )


def _clients(run: SavedRun, folder: FigureFolder) -> Markup:
    count = run.label_count
    parts = [
        folder.add(
            "label_counts",
            figures.label_counts(count),
            "Training images of each class at each client.",
        )
    ]
    if len(count) > MOST_SIZES:
        drawn = figures.sizes(count.sum(axis=1))
        parts.append(folder.add("sizes", drawn, "How many images the clients hold."))
    head, rows = _client_rows(run)
    caption = "clients: images, classes and findings"
    shown = html.table if len(rows) <= MOST_ROWS else html.searchable
    return html.side_by_side(*parts) + shown(head, rows, caption)


def _client_rows(run: SavedRun) -> tuple[list[str], list[list[str]]]:
    """What is known of each client, one column per finding that the run has."""
    count = run.label_count
    columns = {
        "client": [str(i) for i in range(len(count))],
        "images": [str(n) for n in count.sum(axis=1)],
        "classes": [str(n) for n in (count > 0).sum(axis=1)],
        "main class": [
            f"{row.argmax()} ({100 * row.max() / max(row.sum(), 1):.0f} %)"
            for row in count
        ],
    }
    first = f"after {glossary.model('init', run.settings)}"
    for name, found in run.client_columns().items():
        columns[name.replace("after init", first)] = found
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _costs(run: SavedRun, folder: FigureFolder) -> Markup:
    head = ["stage", "seconds", "of these compiling", "waiting", "TFLOP"]
    head += ["peak memory, MB", "MB up", "MB down", "padding waste"]
    waste = run.summary.padding_waste
    rows = [
        (
            glossary.stage(stage, run.settings),
            f"{record.seconds:.1f}",
            f"{record.time['compiling']:.1f}",
            f"{record.time['waiting']:.1f}",
            f"{record.flops / 1e12:.3g}",
            f"{record.peak_memory_bytes / 1e6:.0f}",
            f"{sum(record.up.values()) / 1e6:.2f}",
            f"{sum(record.down.values()) / 1e6:.2f}",
            f"{waste[stage]:.3f}" if stage in waste else "",
        )
        for stage, record in run.records.items()
    ]
    time = {
        glossary.stage(stage, run.settings): record.time
        for stage, record in run.records.items()
    }
    traffic = run.summary.communication_bytes
    sent = {
        f"{direction} ({who})": {
            payload: count / 1e6 for payload, count in traffic[direction].items()
        }
        for direction, who in (("up", "from clients"), ("down", "to clients"))
    }
    return html.table(head, rows, "Costs by stage") + html.side_by_side(
        folder.add(
            "seconds",
            figures.shares(time, xlabel="seconds", fmt=".1f"),
            "Seconds in each stage.",
        ),
        folder.add(
            "communication",
            figures.shares(sent, xlabel="MB", fmt=".2f"),
            "What all clients sent and received over the study, by payload.",
        ),
    )


def _settings(run: SavedRun) -> Markup:
    """Hardware, versions, command and every setting of a run."""
    versions = ", ".join(f"{n} {v}" for n, v in run.summary.versions.items())
    split, revision = run.summary.partition["sha256"], run.revision or "unknown"
    return (
        html.paragraph(f"{run.summary.device}; {versions}.")
        + html.paragraph(f"Split {split[:12]}, revision {revision[:12]}.")
        + (html.listing(" ".join(run.command)) if run.command else "")
        + html.folded("All settings", html.listing(json.dumps(run.settings, indent=2)))
    )
