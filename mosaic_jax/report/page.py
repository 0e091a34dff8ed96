"""report.html of one run: what happened, in one file."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mosaic_jax import files
from mosaic_jax.report import figures, html, runs
from mosaic_jax.report.runs import Run

# Up to here a table holds every client; past it, a search.
MOST_ROWS = 60


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Write report.html and figures/ of a finished study.

    Raises:
      DataError: its files are missing or damaged.
    """
    run = runs.read(workdir)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    drawn = Drawn(folder)
    sections = [
        ("Accuracy", _accuracy(run, drawn)),
        ("Classes", _classes(run, drawn)),
        ("Clients", _clients(run, drawn)),
        ("Generators", _generators(run, drawn)),
        ("Experts and teacher", _experts(run, drawn)),
        ("Audit of the generators", _audit(run, drawn)),
        ("Costs", _costs(run, drawn)),
        ("Settings and environment", environment(run)),
    ]
    path = workdir / "report.html"
    data = run.config["data"]
    lead = (
        f"{data['num_clients']} clients, split {data['split']}"
        + (f" at alpha {data['alpha']}" if "dirichlet" in data["split"] else "")
        + f", {run.summary['rounds']} federated rounds"
    )
    files.write_bytes(path, html.page(run.title, lead, sections).encode())
    return path


class Drawn:
    """Figures that go into the page and, as PNG, into a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __call__(self, name: str, drawn: Figure, caption: str) -> str:
        """The figure as HTML."""
        figures.save(drawn, self.folder / f"{name}.png")
        return html.figure(drawn, caption)


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "" if value is None else f"{100 * value:.2f} %"


def _accuracy(run: Run, draw: Drawn) -> str:
    summary = run.summary
    sets = [n for n in ("test", "validation") if f"{n}_accuracy" in summary]
    test = summary["test_accuracy"]
    sent = sum(summary["communication_bytes"]["up"].values())
    rows = [
        (model, *(percent(summary[f"{name}_accuracy"].get(model)) for name in sets))
        for model in test
    ]
    headline = {
        "test accuracy of the final model": percent(test.get("final")),
        "MB sent by clients": f"{sent / 1e6:.1f}",
        "seconds": f"{sum(summary['seconds'].values()):.0f}",
    }
    if "audit" in summary:
        headline["membership-inference AUC"] = f"{summary['audit']['auc']['mean']:.3f}"
    curve = run.curve()
    parts = []
    if len(curve["round"]):
        stages = list(dict.fromkeys(curve["stage"].tolist()))
        marks = ("teacher", "distilled", "personal")

        def lines(axis: str, scale: float = 1) -> dict:
            return {
                stage: (
                    curve[axis][curve["stage"] == stage] / scale,
                    curve["accuracy"][None, curve["stage"] == stage],
                )
                for stage in stages
            }

        parts = [
            draw(
                "accuracy",
                figures.curves(
                    lines("round"),
                    xlabel="federated round",
                    marks={name: test[name] for name in marks if name in test},
                ),
                "Test accuracy of the global model over federated rounds. Horizontal:"
                " the teacher, the student after distillation, or the mean of the"
                " clients' own models, where the method has them.",
            ),
            draw(
                "accuracy_bytes",
                figures.curves(lines("bytes", 1e6), xlabel="MB sent by clients"),
                "The same against what all clients had sent by then, generators,"
                " prototypes and label counts included.",
            ),
        ]
    rates = run.rate_accuracy()
    if rates:
        found = {rate: {"mean": v, "spread": 0.0} for rate, v in rates.items()}
        parts.append(
            draw(
                "rates",
                figures.rates({"final": found}),
                "Test accuracy of the parts of the final model that clients of each"
                " rate hold.",
            )
        )
    return (
        html.cards(headline)
        + html.table(["model", *sets], rows, "Accuracy of every model")
        + html.side_by_side(*parts)
    )


def _classes(run: Run, draw: Drawn) -> str:
    models = list(run.predictions())
    if not models:
        return ""
    last = models[-1]
    parts = [
        draw(
            "per_class",
            figures.per_class({name: run.per_class(name) for name in models}),
            "Test accuracy within each class.",
        ),
        draw(
            "confusion",
            figures.heat(
                run.confusion(last).astype(float),
                xlabel="taken for",
                ylabel="class",
                label="test images",
                fmt=".0f",
            ),
            f"Confusion of the model '{last}': how often a class (row) was taken for"
            " another (column).",
        ),
    ]
    return html.side_by_side(*parts) + _teacher_and_student(run)


def _teacher_and_student(run: Run) -> str:
    found = run.predictions()
    if "teacher" not in found or "distilled" not in found:
        return ""
    label = np.array(run.split["held_out_labels"]["test"])
    teacher, student = (found[name] == label for name in ("teacher", "distilled"))
    both = [
        ("teacher right", np.mean(teacher & student), np.mean(teacher & ~student)),
        ("teacher wrong", np.mean(~teacher & student), np.mean(~teacher & ~student)),
    ]
    rows = [(name, *(percent(value) for value in values)) for name, *values in both]
    agree = np.mean(found["teacher"] == found["distilled"])
    return html.paragraph(
        f"Teacher and distilled student answer alike on {percent(float(agree))} of the"
        " test images:"
    ) + html.table(
        ["share of the test images", "student right", "student wrong"],
        rows,
        "Teacher against student",
    )


def _clients(run: Run, draw: Drawn) -> str:
    count = run.label_count
    size = count.sum(axis=1)
    parts = [
        draw(
            "label_counts",
            figures.label_counts(count),
            "Training images of each class at each client.",
        )
    ]
    if len(count) > 25:
        parts.append(
            draw("sizes", figures.sizes(size), "How many images the clients hold.")
        )
    head, rows = _client_rows(run)
    caption = "clients: images, classes and findings"
    listed = (
        html.table(head, rows, caption)
        if len(rows) <= MOST_ROWS
        else html.searchable(head, rows, caption)
    )
    return html.side_by_side(*parts) + listed


def _client_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """What is known of each client, one column per finding that the run has."""
    count = run.label_count
    size = count.sum(axis=1)
    columns: dict[str, list[str]] = {
        "client": [str(i) for i in range(len(count))],
        "images": [str(n) for n in size],
        "classes": [str(n) for n in (count > 0).sum(axis=1)],
        "main class": [
            f"{row.argmax()} ({100 * row.max() / max(row.sum(), 1):.0f} %)"
            for row in count
        ],
    }
    budgets = run.summary["budgets"]
    if budgets:
        rate = {i: row["rate"] for row in budgets for i in row["clients"]}
        columns["rate"] = [str(rate[i]) for i in range(len(count))]
    for stage, found in run.records.items():
        values = found["results"].get("client_test_accuracy", [])
        if len(values) == len(count):
            columns[f"own model after {stage}"] = [percent(value) for value in values]
    collapsed = set(run.summary["collapsed_generators"])
    if run.results("generators"):
        columns["generator"] = [
            "collapsed" if i in collapsed else "kept" for i in range(len(count))
        ]
    audited = run.results("audit").get("clients", [])
    if audited:
        auc = {row["client"]: f"{row['auc']:.3f}" for row in audited}
        columns["membership AUC"] = [auc.get(i, "") for i in range(len(count))]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _networks(run: Run) -> Iterator[tuple[str, str]]:
    """(name, end of its stages' names) of each network of the study."""
    yield run.config["model"]["name"], ""
    for name in run.config["model"]["others"]:
        yield name, f"@{name}"


def _generators(run: Run, draw: Drawn) -> str:
    body = ""
    collapsed = run.summary["collapsed_generators"]
    for network, end in _networks(run):
        found = run.pictures(f"generators{end}")
        if not found:
            continue
        film, real = found["film"], found["real"]
        names = [f"client {i}" for i in found["client"]]
        draw(
            f"generated{end}",
            figures.film(film, real, names),
            "Real and generated images of each client.",
        )
        shares = found["share"]
        head = ["client", "real", *(f"after {100 * share:.0f} %" for share in shares)]
        rows = []
        for i, name in enumerate(names):
            cells = [html.image(_row_of(real[i]), f"{name}, real images")]
            for moment, share in zip(film[i], shares, strict=True):
                label = f"{name}, generated after {100 * share:.0f} % of its steps"
                cells.append(html.image(_row_of(moment), label))
            rows.append((name, cells))
        kind = f" ({network})" if end else ""
        body += html.paragraph(
            f"Real images of each client{kind} beside those of its generator, from the"
            " same noise over its training"
            + (
                f"; the first {len(names)} clients."
                if len(names) < run.config["data"]["num_clients"]
                else "."
            )
        ) + html.strips(head, rows, f"Generated images{kind}")
    if body:
        names = ", ".join(map(str, collapsed)) or "none"
        body += html.paragraph(f"Collapsed generators, left out: {names}.")
    return body


def _row_of(images: np.ndarray) -> np.ndarray:
    """[n, H, W, D] side by side."""
    return np.concatenate(list(images), axis=1)


def _experts(run: Run, draw: Drawn) -> str:
    parts = []
    for network, end in _networks(run):
        found = run.results(f"experts{end}").get("expert_class_accuracy")
        if found:
            parts.append(
                draw(
                    f"experts{end}",
                    figures.heat(
                        np.array(found, float),
                        xlabel="class of the image",
                        ylabel="expert",
                        label="test accuracy",
                        fmt=".2f",
                    ),
                    f"Share of each class's test images that each expert ({network})"
                    " gets right.",
                )
            )
    meta = run.results("meta")
    for key, caption in (
        (
            "reliance",
            "How much of the teacher's score for an image's class comes through each"
            " expert (gradient times input, mean over test images of the class).",
        ),
        (
            "gate_weight",
            "Mean weight that the gate gives each expert on test images of a class.",
        ),
        (
            "attention",
            "Attention of the meta head's decoder from expert (row) to expert"
            " (column), mean over test images and heads.",
        ),
    ):
        if key in meta:
            across = "expert" if key == "attention" else "class of the image"
            parts.append(
                draw(
                    key,
                    figures.heat(
                        np.array(meta[key], float),
                        xlabel=across,
                        ylabel="expert",
                        label=key.replace("_", " "),
                        fmt=".2f",
                    ),
                    caption,
                )
            )
    return html.side_by_side(*parts)


def _audit(run: Run, draw: Drawn) -> str:
    results = run.results("audit")
    if not results:
        return ""
    rows = [
        (name, interval(row), row["meaning"])
        for name, row in run.summary["audit"].items()
    ]
    body = html.table(["measure", "value [95 %]", "what it means"], rows, "Audit")
    clients = results["clients"]
    body += html.side_by_side(
        draw(
            "audit",
            figures.scatter(
                [row["images"] for row in clients],
                [row["auc"] for row in clients],
                xlabel="training images of the client",
                ylabel="membership-inference AUC",
                level=0.5,
            ),
            "How well an attacker who holds a client's generator tells that client's"
            " training images from others; 0.5 is chance.",
        )
    )
    found = run.pictures("audit")
    if found:
        head = ["client", "generated", "nearest training image", "nearest held out"]
        pairs = [
            (
                f"client {client}",
                [
                    html.image(image, name)
                    for image, name in zip(
                        (generated, train, held_out), head[1:], strict=True
                    )
                ],
            )
            for client, generated, train, held_out in zip(
                found["client"],
                found["generated"],
                found["nearest_train"],
                found["nearest_held_out"],
                strict=True,
            )
        ]
        body += html.paragraph(
            "The generated images that are nearest to a training image, compared with"
            " their distance to images that no client holds:"
        ) + html.strips(head, pairs, "Worst pairs")
    return body


def interval(row: Mapping[str, Any]) -> str:
    """A number with its confidence interval."""
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _costs(run: Run, draw: Drawn) -> str:
    summary, rows = run.summary, []
    for stage, record in run.records.items():
        rows.append(
            (
                stage,
                f"{record['seconds']:.1f}",
                f"{record['time']['compiling']:.1f}",
                f"{record['time']['waiting']:.1f}",
                f"{record['flops'] / 1e12:.3g}",
                f"{record['peak_memory_bytes'] / 1e6:.0f}",
                f"{sum(record['up'].values()) / 1e6:.2f}",
                f"{sum(record['down'].values()) / 1e6:.2f}",
                _waste(summary["padding_waste"].get(stage)),
            )
        )
    head = ["stage", "seconds", "of these compiling", "waiting", "TFLOP"]
    head += ["peak memory, MB", "MB up", "MB down", "padding waste"]
    traffic = summary["communication_bytes"]
    parts = [
        draw(
            "seconds",
            figures.shares(
                {stage: record["time"] for stage, record in run.records.items()},
                xlabel="seconds",
                fmt=".1f",
            ),
            "Seconds in each stage.",
        ),
        draw(
            "communication",
            figures.shares(
                {
                    f"{direction} ({who})": {
                        name: count / 1e6 for name, count in payloads.items()
                    }
                    for direction, who, payloads in (
                        ("up", "from clients", traffic["up"]),
                        ("down", "to clients", traffic["down"]),
                    )
                },
                xlabel="MB",
                fmt=".2f",
            ),
            "What all clients sent and received over the study, by payload.",
        ),
    ]
    return html.table(head, rows, "Costs by stage") + html.side_by_side(*parts)


def _waste(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def environment(run: Run) -> str:
    """Hardware, versions, command and every setting of a run."""
    config = files.read_json(run.path / "config.json")
    versions = ", ".join(f"{n} {v}" for n, v in run.summary["versions"].items())
    text = html.paragraph(f"{run.summary['device']}; {versions}.")
    shown = json.dumps(run.config, indent=2)
    revision = config.get("git_revision") or "unknown"
    split = run.summary["partition"]["sha256"]
    text += html.paragraph(f"Split {split[:12]}, revision {revision[:12]}.")
    return (
        text
        + html.listing(" ".join(config.get("command", [])))
        + html.folded("All settings", html.listing(shown))
    )
