"""Several methods over several seeds, on equal terms: table, figures and page."""

import html
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mosaic_jax import errors, evaluation, settings, tracking
from mosaic_jax.experiment import Experiment
from mosaic_jax.report import figures, page

# Method to its studies, one per seed, in the same order of seeds.
Studies = Mapping[str, Sequence[Experiment]]

EQUAL = ("data", "budgets", "local", "evaluation")
# Found when a study's first stage ran.
RECORDED = ("initial_params_sha256", "batch_order_sha256")


def check_fair(studies: Studies) -> dict[str, Any]:
    """What every method shares, before anything runs.

    Raises:
      ConfigError: data, split, model, local work, rounds or evaluation differ.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        found = [_terms(work) for work in group]
        for name, terms in zip(studies, found, strict=True):
            for term, value in terms.items():
                if value != found[0][term]:
                    raise errors.ConfigError(
                        f"compare: {term} of {name} = {value}: must be"
                        f" {found[0][term]}, as {next(iter(studies))} has it"
                    )
        shared[str(group[0].settings.seed)] = found[0]
    return shared


def _terms(work: Experiment) -> dict[str, Any]:
    groups = settings.to_mapping(work.settings)
    return {
        "seed": work.settings.seed,
        "split_sha256": work.data.sha256,
        "augmentation": work.data.info.augmentation,
        "total_rounds": work.settings.total_rounds,
        "clients_per_round": work.settings.init.clients_per_round,
        # A method may give everyone a smaller network; its table row says so.
        "model": {n: value for n, value in groups["model"].items() if n != "rate"},
        **{name: groups[name] for name in EQUAL},
    }


def check_recorded(studies: Studies) -> dict[str, Any]:
    """Initial parameters and batch order, as the finished programs recorded them.

    Raises:
      MosaicError: they differ between methods.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        found = [work.finished()[0].record["results"] for work in group]
        rates = [work.settings.model.rate for work in group]
        whole = [one for one, rate in zip(found, rates, strict=True) if rate == 1]
        for key, compared in zip(RECORDED, (whole, found), strict=True):
            if len({results[key] for results in compared}) > 1:
                values = [results[key] for results in found]
                listed = dict(zip(studies, values, strict=True))
                raise errors.MosaicError(f"compare: {key} differs: {listed}")
        seed = str(group[0].settings.seed)
        shared[seed] = {key: (whole or found)[0][key] for key in RECORDED}
    return shared


def summarise(studies: Studies) -> dict[str, Any]:
    """Mean and spread over seeds, costs, and what differs by nature, per method."""
    rows = {}
    for name, works in studies.items():
        found = [work.summarise(work.finished()) for work in works]
        row: dict[str, Any] = {
            "test_accuracy": _spread([s["test_accuracy"]["final"] for s in found]),
            "bytes_up": found[0]["communication_bytes"]["up"],
            "bytes_down": found[0]["communication_bytes"]["down"],
            "seconds": _spread([sum(s["seconds"].values()) for s in found]),
            "server": server_work(works[0].settings),
        }
        if "validation_accuracy" in found[0]:
            values = [s["validation_accuracy"]["final"] for s in found]
            row["validation_accuracy"] = _spread(values)
        by_rate = [_rate_accuracy(work) for work in works]
        if by_rate[0]:
            row["rate_accuracy"] = {
                rate: _spread([found[rate] for found in by_rate]) for rate in by_rate[0]
            }
        if "personal" in found[0]["test_accuracy"]:
            values = [s["test_accuracy"]["personal"] for s in found]
            row["personal_test_accuracy"] = _spread(values)
        rows[name] = row
    return {
        "seeds": [work.settings.seed for work in next(iter(studies.values()))],
        "fair": check_fair(studies),
        "recorded": check_recorded(studies),
        "methods": rows,
    }


def server_work(study: settings.Settings) -> str:
    """What the server does besides aggregation, in words."""
    if study.model.rate < 1:
        return f"none; networks of rate {study.model.rate}"
    if study.method == "mosaic":
        return (
            f"head {study.meta.steps} steps, student {study.distill.steps} steps;"
            " clients also train GANs"
        )
    if study.trains_once:
        return f"once, {study.server.rounds} rounds"
    if study.trains_every_round:
        iterations = study.methods[study.server.method].get("iterations", 1)
        return f"every round, {iterations} iterations"
    return "none"


def _rate_accuracy(work: Experiment) -> dict[str, float]:
    """Of the parts of the final model that clients of each rate hold; else empty."""
    results = work.finished()[-1].record["results"]
    return results.get("rate_accuracy", {})


def table(summary: dict[str, Any]) -> str:
    """Markdown, as printed and in the README."""
    rows = summary["methods"]
    personal = any("personal_test_accuracy" in row for row in rows.values())
    partial = [row["rate_accuracy"] for row in rows.values() if "rate_accuracy" in row]
    smallest = min(partial[0], key=float) if partial else ""
    head = ["method", "test accuracy, %"]
    head += ["clients' own models, %"] * personal
    head += [f"its part of rate {smallest}, %"] * bool(partial)
    head += ["MB up", "seconds", "training on the server"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        cells = [name, _per_cent(row["test_accuracy"])]
        if personal:
            cells.append(_per_cent(row.get("personal_test_accuracy")))
        if partial:
            cells.append(_per_cent(row.get("rate_accuracy", {}).get(smallest)))
        cells += [
            f"{sum(row['bytes_up'].values()) / 1e6:.1f}",
            f"{row['seconds']['mean']:.0f}",
            row["server"],
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(studies: Studies, folder: pathlib.Path) -> tuple[dict[str, Any], list]:
    """comparison.json, comparison.html and figures/ in `folder`.

    Returns:
      What comparison.json holds, and the paths of both.

    Raises:
      MosaicError: the methods were not on equal terms.
    """
    summary = summarise(studies)
    tracking.write_json(folder / "comparison.json", summary)
    pictures = folder / "figures"
    pictures.mkdir(exist_ok=True)
    parts = []
    for name, caption, figure in _figures(studies, summary):
        figure.savefig(pictures / f"{name}.png", dpi=110)
        parts.append(page.embedded(figure, caption))
    path = folder / "comparison.html"
    partial = path.with_suffix(".partial")
    partial.write_text(_page(studies, summary, parts))
    partial.replace(path)
    return summary, [folder / "comparison.json", path]


def _figures(studies: Studies, summary: dict[str, Any]) -> list[tuple]:
    curves = {name: _curves(works) for name, works in studies.items()}
    seeds = len(summary["seeds"])
    band = "; bands: one standard deviation over seeds" if seeds > 1 else ""
    rows = summary["methods"]
    result = [
        (
            "methods",
            f"Final test accuracy over {seeds} seeds; whiskers: standard deviation.",
            figures.bars({n: row["test_accuracy"] for n, row in rows.items()}),
        ),
        (
            "rounds",
            f"Test accuracy of the global model over federated rounds{band}.",
            figures.curves(
                {n: (c["round"], c["accuracy"]) for n, c in curves.items()},
                xlabel="federated round",
            ),
        ),
        (
            "bytes",
            "Test accuracy against what all clients have sent by then, generators,"
            f" prototypes and label counts included{band}.",
            figures.curves(
                {n: (c["bytes"] / 1e6, c["accuracy"]) for n, c in curves.items()},
                xlabel="MB sent up",
            ),
        ),
        (
            "classes",
            "Test accuracy of the final model within each class, mean over seeds.",
            figures.classes(
                {name: _per_class(works) for name, works in studies.items()}
            ),
        ),
        (
            "seconds",
            "Seconds of a study, mean over seeds. Stages that methods share were run"
            " once and count for each.",
            figures.seconds({n: row["seconds"]["mean"] for n, row in rows.items()}),
        ),
    ]
    by_rate = {n: r["rate_accuracy"] for n, r in rows.items() if "rate_accuracy" in r}
    if by_rate:
        result.append(
            (
                "rates",
                "Test accuracy of the parts of the final model that clients of each"
                " rate hold; whiskers: standard deviation over seeds.",
                figures.rates(by_rate),
            )
        )
    return result


def _curves(works: Sequence[Experiment]) -> dict[str, np.ndarray]:
    """Rounds [R], bytes sent by then [R], accuracy [seeds, R]."""
    accuracy = []
    for work in works:
        rounds, sent, values = [], [], []
        offset, payload = 0, 0
        for done in work.finished():
            record = done.record
            history = [r for r in record["history"] if r["loop"] == "round"]
            total = sum(record["up"].values())
            extra = total - record["up"].get("models", 0)
            steps = history[-1]["step"] if history else 0
            for r in history:
                rounds.append(offset + r["step"])
                share = record["up"]["models"] * r["step"] / steps
                sent.append(payload + extra + share)
                values.append(r["test_accuracy"])
            offset += steps
            payload += total
        accuracy.append(values)
    return {
        "round": np.array(rounds),
        "bytes": np.array(sent),
        "accuracy": np.array(accuracy),
    }


def _per_class(works: Sequence[Experiment]) -> np.ndarray:
    """[K] of the final models."""
    found = []
    for work in works:
        predicted = [
            done.record["results"]["predictions"]
            for done in work.finished()
            if "predictions" in done.record["results"]
        ][-1]
        label = np.asarray(work.data.held_out["test"].label)
        found.append(
            evaluation.per_class_accuracy(
                np.array(predicted), label, work.data.info.num_classes
            )
        )
    return np.mean(found, axis=0)


def _page(studies: Studies, summary: dict[str, Any], parts: list[str]) -> str:
    first = next(iter(studies.values()))[0]
    data = first.settings.data
    title = f"{len(studies)} methods on {data.name}"
    head, _, *lines = table(summary).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    names = [cell.strip() for cell in head.split("|")[1:-1]]
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    terms = next(iter(summary["fair"].values()))
    equal = "".join(
        f"<li>{html.escape(name)}: {html.escape(str(terms[name]))}</li>"
        for name in ("total_rounds", "clients_per_round", "augmentation", "local")
    )
    hashes = "".join(
        f"<li>seed {seed}: split {terms['split_sha256'][:12]}, initial parameters"
        f" {found[RECORDED[0]][:12]}, batch order {found[RECORDED[1]][:12]}</li>"
        for (seed, terms), found in zip(
            summary["fair"].items(), summary["recorded"].values(), strict=True
        )
    )
    body = f"""
<p>{data.num_clients} clients, split {html.escape(data.split)} at alpha {data.alpha},
seeds {", ".join(map(str, summary["seeds"]))}.</p>
<table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table>
{"".join(parts)}
<h2>Equal terms</h2><p>Checked, not assumed: all methods had the same</p>
<ul>{equal}{hashes}</ul>"""
    return page.document(title, body)


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "spread": spread}


def _per_cent(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    spread = f" ± {100 * value['spread']:.1f}" if value["spread"] else ""
    return f"{100 * value['mean']:.1f}{spread}"
