"""Several studies, each of one or more seeds: table, figures and one page."""

import collections
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np
from markupsafe import Markup

from mosaic_jax import server
from mosaic_jax.core import files, registry, schema
from mosaic_jax.fl import algorithms
from mosaic_jax.report import figures, glossary, html, names, privacy, ranking
from mosaic_jax.report.html import FigureFolder
from mosaic_jax.report.runs import FINAL, Groups, SavedRun
from mosaic_jax.run.settings import NEUTRAL
from mosaic_jax.run.summary import means
from mosaic_jax.stages.audit import Audit
from mosaic_jax.stages.leakage import Leakage
from mosaic_jax.stages.reference import Reference

# {"mean", "spread"}; the spread is the standard deviation of a sample, 0 of one.
Spread = dict[str, float]
Rows = Mapping[str, Mapping[str, Any]]
# They differ between runs of the same study, or tell nothing about its result.
NOT_COMPARED = ("seed", "seeds", "compare", "profile", "data.dir")
# Stages that look at what methods do and are no part of any.
MEASURING = frozenset({Reference.name, Audit.name, Leakage.name})
# Models beside the final one that a table has, by their column.
OTHER_MODELS = {
    "teacher": "teacher, %",
    "distilled": "distilled, %",
    "personal": "clients' own models, %",
    "nearest_prototype": "by nearest prototype, %",
}


def summarise(groups: Groups) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds, and costs, of each study by its name."""
    return {name: _summarise(group) for name, group in groups.items()}


def _summarise(group: Sequence[SavedRun]) -> dict[str, Any]:
    found = [run.summary for run in group]
    first = found[0]
    row: dict[str, Any] = {
        "seeds": [summary.seed for summary in found],
        "bytes_up": means([one.communication_bytes["up"] for one in found]),
        "bytes_down": means([one.communication_bytes["down"] for one in found]),
        "flops": statistics.mean(cost_of(summary.flops) for summary in found),
        "seconds": _spread([cost_of(summary.seconds) for summary in found]),
        "server": server_work(group[0].settings),
    }
    for held_out, accuracy in first.accuracies.items():
        for model in (FINAL, *OTHER_MODELS):
            # Of the other models a comparison has the test accuracy alone.
            if model in accuracy and (model == FINAL or held_out == "test"):
                of_model = "" if model == FINAL else f"{model}_"
                values = [summary.accuracies[held_out][model] for summary in found]
                row[f"{of_model}{held_out}_accuracy"] = _spread(values)
    by_rate = [run.rate_accuracy() for run in group]
    if by_rate[0]:
        row["rate_accuracy"] = {
            rate: _spread([one[rate] for one in by_rate]) for rate in by_rate[0]
        }
    if first.headline:
        row["headline"] = {
            name: _spread([summary.headline[name]["mean"] for summary in found])
            | ({"card": number["card"]} if "card" in number else {})
            for name, number in first.headline.items()
            if all(name in summary.headline for summary in found)
        }
    return row


def cost_of(stages: Mapping[str, float]) -> float:
    """What a method costs: the sum over its stages, without those that only measure."""
    return sum(value for name, value in stages.items() if name not in MEASURING)


def server_work(settings: Mapping[str, Any]) -> str:
    """What the server does besides aggregation, in words, and of which networks."""
    rate = settings["model"]["rate"]
    return _server_work(settings) + (f"; networks of rate {rate}" if rate < 1 else "")


def _server_work(settings: Mapping[str, Any]) -> str:
    if settings["method"] == "mosaic":
        return (
            f"head {settings['meta']['steps']} steps, student"
            f" {settings['distill']['steps']} steps; clients also train GANs"
        )
    if settings["server"]["method"] == "none":
        algorithm = algorithms.ALGORITHMS.get(settings["init"]["method"])
        return algorithm.server_work if algorithm else "none"
    if settings["server"]["when"] == "once":
        method = server.METHODS.get(settings["server"]["method"])
        asks = method is not None and method.asks_for_generators
        gans = "; clients also train GANs" if asks else ""
        return f"once, {settings['server']['rounds']} rounds{gans}"
    iterations = _iterations(settings)
    return "every round" + (f", {iterations} iterations" if iterations else "")


def _iterations(settings: Mapping[str, Any]) -> int | None:
    """Of the server's method in a round; None where it is not told."""
    name = settings["server"]["method"]
    method = server.METHODS.get(name)
    if method is None:  # the user's own, which a report does not import
        return None
    fields = schema.defaults(method)
    fields |= settings["methods"].get(registry.group_of(name, method), {})
    return fields.get("iterations")


def columns(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table over all studies; only what some study has."""
    rates = {rate for row in rows.values() for rate in row.get("rate_accuracy", {})}
    smallest = min(rates, key=float, default="")
    cards = dict.fromkeys(card for row in rows.values() for card in _cards(row))
    found: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "test accuracy, %": lambda row: _per_cent(row.get("test_accuracy")),
        **{
            column: lambda row, model=model: _per_cent(
                row.get(f"{model}_test_accuracy")
            )
            for model, column in OTHER_MODELS.items()
        },
        f"its part of rate {smallest}, %": lambda row: _per_cent(
            row.get("rate_accuracy", {}).get(smallest)
        ),
        **{card: lambda row, card=card: _cards(row).get(card, "") for card in cards},
        "MB up": lambda row: f"{sum(row['bytes_up'].values()) / 1e6:.1f}",
        "TFLOP": lambda row: f"{row['flops'] / 1e12:.3g}",
        "seconds": lambda row: f"{row['seconds']['mean']:.0f}",
        "training on the server": lambda row: row["server"],
    }
    kept = {n: of for n, of in found.items() if any(of(r) for r in rows.values())}
    named = zip(names.distinct(list(rows)), rows.values(), strict=True)
    cells = [[name, *(of(row) for of in kept.values())] for name, row in named]
    return ["study", *kept], cells


def _cards(row: Mapping[str, Any]) -> dict[str, str]:
    """The headline numbers of a study that are seen at a glance."""
    return {
        number["card"]: f"{number['mean']:.3f}"
        for number in row.get("headline", {}).values()
        if "card" in number
    }


def table(rows: Rows) -> str:
    """Markdown, as printed and in docs/results.md."""
    head, cells = columns(rows)
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(
    groups: Groups,
    path: pathlib.Path,
    *,
    title: str,
    terms: Mapping[str, Any] | None = None,
    interactive: bool = False,
) -> dict[str, Any]:
    """One page over all `groups`, and its figures as PNG in figures/ beside it.

    Args:
      groups: of `runs.collect`.
      path: of the page.
      title: its heading.
      terms: what was checked to be equal, by seed; None: nothing was.
      interactive: with charts in place of drawings, see `charts`; some megabytes.

    Returns:
      What `summarise` found.
    """
    result = summarise(groups)
    common = ", ".join(names.common(list(groups)))
    shown = names.distinct(list(groups))
    groups = dict(zip(shown, groups.values(), strict=True))
    rows = dict(zip(shown, result.values(), strict=True))
    short = names.labels(shown)
    drawn = dict(zip(short, groups.values(), strict=True))
    drawn_rows = dict(zip(short, result.values(), strict=True))
    folder = FigureFolder(path.parent / "figures", interactive=interactive)
    first = next(iter(groups.values()))[0].summary
    head, cells = columns(rows)
    sections = {
        "Summary": _links(groups, path) + html.table(head, cells, "All studies"),
        "Ranking": ranking.ranking(groups) if len(groups) > 1 else Markup(),
        "Accuracy": _accuracy(drawn, drawn_rows, folder),
        "Classes": _classes(drawn, folder),
        "Privacy": privacy.trade_off(groups, folder),
        "Costs": _costs(drawn, folder),
        "Equal terms": _terms(terms) if terms else Markup(),
        "Differences in settings": _differences(groups),
        "Where they ran": _environments(groups),
    }
    num_clients = first.partition["num_clients"]
    lead = f"{len(groups)} studies; {num_clients} clients, {first.dataset}"
    lead += f"; all with {common}" if common else ""
    terms_used = glossary.used("".join(sections.values()))
    if terms_used:
        sections["Terms"] = html.terms(terms_used)
    text = html.page(title, lead, sections, _headline(rows))
    files.write_bytes(path, text.encode())
    return result


def _headline(rows: Rows) -> str:
    """The best study and the next, by their test accuracy."""
    found = {
        name: row.get("test_accuracy") or row["personal_test_accuracy"]
        for name, row in rows.items()
    }
    order = sorted(found, key=lambda name: -found[name]["mean"])
    shown = [f"{name} {_per_cent(found[name])} %" for name in order[:2]]
    return f"Highest test accuracy: {', then '.join(shown)}."


def _links(groups: Groups, path: pathlib.Path) -> Markup:
    """To each run's own report, as seen from `path`."""
    targets = {}
    for name, group in groups.items():
        for run in group:
            report = run.path / "report.html"
            if report.exists():
                address = os.path.relpath(report, path.parent)
                seed = f", seed {run.summary.seed}" if len(group) > 1 else ""
                targets[f"{name}{seed}"] = pathlib.Path(address).as_posix()
    if not targets:
        return Markup()
    return html.folded("Reports of the single runs", html.links(targets))


def _accuracy(groups: Groups, rows: Rows, folder: FigureFolder) -> Markup:
    # Of methods that end in no global model that of the clients' own models counts.
    final = {
        name: row.get("test_accuracy") or row["personal_test_accuracy"]
        for name, row in rows.items()
    }
    parts = [
        folder.add(
            "methods",
            figures.bars(final),
            "Final test accuracy, mean over seeds; whiskers: standard deviation. Where"
            " a method has no global model, that of the clients' own models.",
        ),
        *_curves(groups, folder),
    ]
    by_rate = {n: r["rate_accuracy"] for n, r in rows.items() if "rate_accuracy" in r}
    if by_rate:
        parts.append(
            folder.add(
                "rates",
                figures.rates(by_rate),
                "Test accuracy of the parts of the final model that clients of each"
                " rate hold; whiskers: standard deviation over seeds.",
            )
        )
    return html.side_by_side(*parts)


def _curves(groups: Groups, folder: FigureFolder) -> list[Markup]:
    """The global models over rounds, and over what was sent."""
    seeds = max(len(group) for group in groups.values())
    band = "; bands: one standard deviation over seeds" if seeds > 1 else ""
    curves = {name: [run.curve() for run in group] for name, group in groups.items()}
    # Seeds that were measured after the same rounds, at least once.
    shown = {
        name: (found[0], np.stack([one["accuracy"] for one in found]))
        for name, found in curves.items()
        if len({len(one["round"]) for one in found}) == 1 and len(found[0]["round"])
    }
    if not shown:
        return []
    rounds = {name: (curve["round"], values) for name, (curve, values) in shown.items()}
    sent = {
        name: (curve["bytes"] / 1e6, values) for name, (curve, values) in shown.items()
    }
    return [
        folder.add(
            "rounds",
            figures.curves(rounds, xlabel="federated round"),
            "Test accuracy of the global model, or else the mean of the clients' own"
            f" models, over federated rounds{band}.",
        ),
        folder.add(
            "bytes",
            figures.curves(sent, xlabel="MB sent by clients"),
            "The same against what all clients had sent by then, generators, prototypes"
            f" and label counts included{band}.",
        ),
    ]


def _classes(groups: Groups, folder: FigureFolder) -> Markup:
    found = {
        name: np.mean([run.per_class() for run in group], axis=0)
        for name, group in groups.items()
        if all(FINAL in run.predictions() for run in group)
    }
    if not found:
        return Markup()
    if len({len(values) for values in found.values()}) > 1:
        return html.paragraph("The studies have different classes.")
    return html.side_by_side(
        folder.add(
            "classes",
            figures.classes(found),
            "Test accuracy of the final model within each class, mean over seeds.",
        )
    )


def _costs(groups: Groups, folder: FigureFolder) -> Markup:
    def mean(group: Sequence[SavedRun]) -> dict[str, float]:
        return means([run.summary.seconds for run in group])

    def sent(group: Sequence[SavedRun], direction: str) -> dict[str, float]:
        each = [run.summary.communication_bytes[direction] for run in group]
        return {name: count / 1e6 for name, count in means(each).items()}

    parts = [
        folder.add(
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
        parts.append(folder.add(f"mb_{direction}", drawn, caption))
    return html.side_by_side(*parts)


def _terms(terms: Mapping[str, Any]) -> Markup:
    flat: list[dict[str, Any]] = [
        dict(flax.traverse_util.flatten_dict(one, sep=".")) for one in terms.values()
    ]
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


def _differences(groups: Groups) -> Markup:
    flat = {
        name: flax.traverse_util.flatten_dict(group[0].settings, sep=".")
        for name, group in groups.items()
    }
    fields = sorted(set().union(*flat.values()))
    critical, neutral = [], []
    for field in fields:
        values = [found.get(field, "") for found in flat.values()]
        if field not in NOT_COMPARED and len({str(value) for value in values}) > 1:
            # What says how a study is run or measured, and no more, changes no result.
            kept = neutral if schema.is_covered(field, NEUTRAL) else critical
            kept.append((field, *values))
    head, parts = ["setting", *groups], []
    if critical:
        parts.append(html.table(head, critical, "Settings that differ"))
    if neutral:
        table = html.table(head, neutral, "Settings that change no result")
        parts.append(html.folded(f"{len(neutral)} more that change no result", table))
    return html.joined(parts) or html.paragraph("None but names and seeds.")


def _environments(groups: Groups) -> Markup:
    where = collections.defaultdict(list)
    for name, group in groups.items():
        versions = ", ".join(f"{n} {v}" for n, v in group[0].summary.versions.items())
        where[f"{group[0].summary.device}; {versions}"].append(name)
    return html.joined(
        [
            html.paragraph(f"{', '.join(names)}: {text}.")
            for text, names in where.items()
        ]
    )


def _spread(values: Sequence[float]) -> Spread:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "spread": spread}


def _per_cent(value: Spread | None) -> str:
    if value is None:
        return ""
    spread = f" ± {100 * value['spread']:.1f}" if value["spread"] else ""
    return f"{100 * value['mean']:.1f}{spread}"
