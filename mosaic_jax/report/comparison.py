"""Several studies, each of one or more seeds: table, figures and one page."""

import collections
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from mosaic_jax import files
from mosaic_jax.report import figures, html, page
from mosaic_jax.report.runs import Groups, Run

Spread = dict[str, float]
# They differ between runs of the same study, or tell nothing about its result.
NOT_COMPARED = ("seed", "seeds", "compare", "profile", "data.dir")


def summarise(groups: Groups) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds, and costs, of each study by its name."""
    return {name: _summarise(group) for name, group in groups.items()}


def _summarise(group: Sequence[Run]) -> dict[str, Any]:
    found = [run.summary for run in group]
    row: dict[str, Any] = {
        "seeds": [summary["seed"] for summary in found],
        "test_accuracy": _spread([s["test_accuracy"]["final"] for s in found]),
        "bytes_up": found[0]["communication_bytes"]["up"],
        "bytes_down": found[0]["communication_bytes"]["down"],
        "flops": sum(found[0]["flops"].values()),
        "seconds": _spread([sum(s["seconds"].values()) for s in found]),
        "server": server_work(group[0].config),
    }
    if "validation_accuracy" in found[0]:
        values = [s["validation_accuracy"]["final"] for s in found]
        row["validation_accuracy"] = _spread(values)
    for name in ("teacher", "personal"):
        if name in found[0]["test_accuracy"]:
            values = [s["test_accuracy"][name] for s in found]
            row[f"{name}_test_accuracy"] = _spread(values)
    by_rate = [run.rate_accuracy() for run in group]
    if by_rate[0]:
        row["rate_accuracy"] = {
            rate: _spread([one[rate] for one in by_rate]) for rate in by_rate[0]
        }
    if "audit" in found[0]:
        row["audit_auc"] = _spread([s["audit"]["auc"]["mean"] for s in found])
    return row


def server_work(config: Mapping[str, Any]) -> str:
    """What the server does besides aggregation, in words."""
    server = config["server"]["method"]
    if config["model"]["rate"] < 1:
        return f"none; networks of rate {config['model']['rate']}"
    if config["method"] == "mosaic":
        return (
            f"head {config['meta']['steps']} steps, student"
            f" {config['distill']['steps']} steps; clients also train GANs"
        )
    if server == "none":
        return "none"
    if config["server"]["when"] == "once":
        return f"once, {config['server']['rounds']} rounds"
    iterations = config["methods"][server].get("iterations", 1)
    return f"every round, {iterations} iterations"


def columns(
    rows: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table over all studies; only what some study has."""
    rates = {rate for row in rows.values() for rate in row.get("rate_accuracy", {})}
    smallest = min(rates, key=float, default="")
    found: list[tuple[str, Callable[[Mapping], str]]] = [
        ("test accuracy, %", lambda row: _per_cent(row["test_accuracy"])),
        ("teacher, %", lambda row: _per_cent(row.get("teacher_test_accuracy"))),
        (
            "clients' own models, %",
            lambda row: _per_cent(row.get("personal_test_accuracy")),
        ),
        (
            f"its part of rate {smallest}, %",
            lambda row: _per_cent(row.get("rate_accuracy", {}).get(smallest)),
        ),
        (
            "membership AUC",
            lambda row: f"{row['audit_auc']['mean']:.3f}" if "audit_auc" in row else "",
        ),
        ("MB up", lambda row: f"{sum(row['bytes_up'].values()) / 1e6:.1f}"),
        ("TFLOP", lambda row: f"{row['flops'] / 1e12:.3g}"),
        ("seconds", lambda row: f"{row['seconds']['mean']:.0f}"),
        ("training on the server", lambda row: row["server"]),
    ]
    kept = [(n, of) for n, of in found if any(of(row) for row in rows.values())]
    cells = [[name, *(of(row) for _, of in kept)] for name, row in rows.items()]
    return ["study", *(name for name, _ in kept)], cells


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, as printed and in the README."""
    head, cells = columns(rows)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(
    groups: Groups,
    path: pathlib.Path,
    *,
    title: str,
    terms: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One page over all `groups`, and its figures as PNG in figures/ beside it.

    Args:
      groups: of `runs.collect`.
      path: of the page.
      title: its heading.
      terms: what was checked to be equal, by seed; None: nothing was.

    Returns:
      What `summarise` found.
    """
    rows = summarise(groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / "figures"
    folder.mkdir(exist_ok=True)
    draw = page.Drawn(folder)
    first = next(iter(groups.values()))[0]
    head, cells = columns(rows)
    sections = [
        ("Summary", _links(groups, path) + html.table(head, cells, "All studies")),
        ("Accuracy", _accuracy(groups, rows, draw)),
        ("Classes", _classes(groups, draw)),
        ("Costs", _costs(groups, draw)),
        ("Equal terms", _terms(terms) if terms else ""),
        ("Differences in settings", _differences(groups)),
        ("Where they ran", _environments(groups)),
    ]
    data = first.config["data"]
    lead = f"{len(groups)} studies; {data['num_clients']} clients, {data['name']}"
    files.write_bytes(path, html.page(title, lead, sections).encode())
    return rows


def _links(groups: Groups, path: pathlib.Path) -> str:
    """To each run's own report, as seen from `path`."""
    targets = {}
    for name, group in groups.items():
        for run in group:
            report = run.path / "report.html"
            if report.exists():
                address = os.path.relpath(report, path.parent)
                seed = f", seed {run.summary['seed']}" if len(group) > 1 else ""
                targets[f"{name}{seed}"] = pathlib.Path(address).as_posix()
    if not targets:
        return ""
    return html.folded("Reports of the single runs", html.links(targets))


def _accuracy(groups: Groups, rows: Mapping[str, Any], draw: page.Drawn) -> str:
    seeds = max(len(group) for group in groups.values())
    band = "; bands: one standard deviation over seeds" if seeds > 1 else ""
    parts = [
        draw(
            "methods",
            figures.bars({n: row["test_accuracy"] for n, row in rows.items()}),
            "Final test accuracy, mean over seeds; whiskers: standard deviation.",
        )
    ]
    found = {name: [run.curve() for run in group] for name, group in groups.items()}
    for axis, scale, xlabel, caption in (
        ("round", 1, "federated round", "over federated rounds"),
        (
            "bytes",
            1e6,
            "MB sent by clients",
            "against what all clients had sent by then, generators, prototypes and"
            " label counts included",
        ),
    ):
        lines = {
            name: (
                group[0][axis] / scale,
                np.stack([one["accuracy"] for one in group]),
            )
            for name, group in found.items()
            if len({len(one["round"]) for one in group}) == 1 and len(group[0]["round"])
        }
        if lines:
            drawn = figures.curves(lines, xlabel=xlabel)
            text = f"Test accuracy of the global model {caption}{band}."
            parts.append(draw(f"{axis}s" if axis == "round" else axis, drawn, text))
    by_rate = {n: r["rate_accuracy"] for n, r in rows.items() if "rate_accuracy" in r}
    if by_rate:
        parts.append(
            draw(
                "rates",
                figures.rates(by_rate),
                "Test accuracy of the parts of the final model that clients of each"
                " rate hold; whiskers: standard deviation over seeds.",
            )
        )
    return html.side_by_side(*parts)


def _classes(groups: Groups, draw: page.Drawn) -> str:
    found = {}
    for name, group in groups.items():
        last = list(group[0].predictions())[-1]
        found[name] = np.mean([run.per_class(last) for run in group], axis=0)
    if len({len(values) for values in found.values()}) > 1:
        return html.paragraph("The studies have different classes.")
    return html.side_by_side(
        draw(
            "classes",
            figures.classes(found),
            "Test accuracy of the final model within each class, mean over seeds.",
        )
    )


def _costs(groups: Groups, draw: page.Drawn) -> str:
    def mean(group: Sequence[Run]) -> dict[str, float]:
        return {
            stage: statistics.mean(run.summary["seconds"][stage] for run in group)
            for stage in group[0].summary["seconds"]
        }

    def sent(group: Sequence[Run], direction: str) -> dict[str, float]:
        payloads = group[0].summary["communication_bytes"][direction]
        return {name: count / 1e6 for name, count in payloads.items()}

    parts = [
        draw(
            "seconds",
            figures.shares(
                {name: mean(group) for name, group in groups.items()}, xlabel="seconds"
            ),
            "Seconds of each stage, mean over seeds. Stages that studies share were run"
            " once and count for each.",
        )
    ]
    for direction, text in (("up", "sent to"), ("down", "got from")):
        drawn = figures.shares(
            {name: sent(group, direction) for name, group in groups.items()},
            xlabel=f"MB {direction}",
            fmt=".1f",
        )
        caption = f"What all clients {text} the server, by payload."
        parts.append(draw(f"mb_{direction}", drawn, caption))
    return html.side_by_side(*parts)


def _terms(terms: Mapping[str, Any]) -> str:
    flat = [flax.traverse_util.flatten_dict(one, sep=".") for one in terms.values()]
    lines = []
    for name in (name for name in flat[0] if name != "seed"):
        values = [found[name] for found in flat]
        if name.endswith("sha256"):
            values = [value[:12] for value in values]
        lines.append((name.replace("_", " "), *values))
    head = ["what", *(f"seed {seed}" for seed in terms)]
    return html.paragraph(
        "Checked, not assumed: all methods had the same split, initial parameters,"
        " batch order, augmentation, local work, rounds and evaluation."
    ) + html.table(head, lines, "What all methods share")


def _differences(groups: Groups) -> str:
    flat = {
        name: flax.traverse_util.flatten_dict(group[0].config, sep=".")
        for name, group in groups.items()
    }
    fields = sorted(set().union(*flat.values()))
    rows = []
    for field in fields:
        values = [found.get(field, "") for found in flat.values()]
        if field not in NOT_COMPARED and len({str(value) for value in values}) > 1:
            rows.append((field, *values))
    if not rows:
        return html.paragraph("None but names and seeds.")
    return html.table(["setting", *groups], rows, "Settings that differ")


def _environments(groups: Groups) -> str:
    where = collections.defaultdict(list)
    for name, group in groups.items():
        versions = ", ".join(
            f"{n} {v}" for n, v in group[0].summary["versions"].items()
        )
        where[f"{group[0].summary['device']}; {versions}"].append(name)
    return "".join(
        html.paragraph(f"{', '.join(names)}: {text}.") for text, names in where.items()
    )


def _spread(values: Sequence[float]) -> Spread:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "spread": spread}


def _per_cent(value: Spread | None) -> str:
    if value is None:
        return ""
    spread = f" ± {100 * value['spread']:.1f}" if value["spread"] else ""
    return f"{100 * value['mean']:.1f}{spread}"
