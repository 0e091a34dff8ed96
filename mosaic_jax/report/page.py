"""report.html of one run: a table and the figures, in one file."""

import base64
import html
import io
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mosaic_jax import evaluation, gan, prng
from mosaic_jax.data.federated import StudyData
from mosaic_jax.experiment import Done, Experiment
from mosaic_jax.report import figures
from mosaic_jax.stages.generators import sample_grid

NUM_GRID_CLIENTS = 20
NUM_GRID_IMAGES = 8

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto;
  padding: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8888; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; overflow-x: auto; }
img { max-width: 100%; background: white; }
figcaption { color: #767676; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def write(study: Experiment) -> pathlib.Path:
    """Draw the figures of a finished study and write its report.html."""
    finished = {done.name: done for done in study.finished()}
    summary = study.summarise(list(finished.values()))
    folder = study.workdir / "figures"
    folder.mkdir(exist_ok=True)
    parts = []
    for name, caption, figure in _figures(study, finished, summary):
        figure.savefig(folder / f"{name}.png", dpi=110)
        parts.append(embedded(figure, caption))
    path = study.workdir / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(_page(study, summary, parts))
    partial.replace(path)
    return path


def _figures(
    study: Experiment, finished: dict[str, Done], summary: dict[str, Any]
) -> list[tuple[str, str, Figure]]:
    """(file name, caption, figure) of everything that this study has."""
    data = study.data
    accuracy = summary["test_accuracy"]
    models = ("teacher", "distilled", "personal")
    marks = {n: accuracy[n] for n in models if n in accuracy}
    result = [
        (
            "label_counts",
            "Training images of each class at each client.",
            figures.label_counts(data.label_count),
        ),
        (
            "accuracy",
            "Test accuracy of the global model over federated rounds. Other"
            " lines, where there are such: the teacher, the student after distillation,"
            " the mean over clients' own models.",
            figures.accuracy_over_rounds(_curves(finished), marks),
        ),
    ]
    for i, network in enumerate(study.networks):
        end = f"@{network}" if i else ""
        if f"generators{end}" in finished:
            members = np.arange(i, data.clients.num_clients, len(study.networks))
            done = finished[f"generators{end}"]
            result.append(_generator_figure(study, done, end, members))
        if f"experts{end}" in finished:
            results = finished[f"experts{end}"].record["results"]
            result.append(
                (
                    f"experts{end}",
                    "Share of each class's test images that each expert"
                    f" ({network}) gets right.",
                    figures.expert_classes(
                        np.array(results["expert_class_accuracy"], float)
                    ),
                )
            )
    result.append(
        (
            "per_class",
            "Test accuracy within each class.",
            figures.per_class(_per_class(data, finished)),
        )
    )
    last = list(finished.values())[-1].record["results"]
    if "rate_accuracy" in last:
        found = {
            rate: {"mean": value, "spread": 0.0}
            for rate, value in last["rate_accuracy"].items()
        }
        result.append(
            (
                "rates",
                "Test accuracy of the parts of the final model that clients of each"
                " rate hold.",
                figures.rates({"final": found}),
            )
        )
    result.append(
        ("seconds", "Seconds in each stage.", figures.seconds(summary["seconds"]))
    )
    return result


def _curves(finished: dict[str, Done]) -> dict[str, list[tuple[int, float]]]:
    curves, offset = {}, 0
    for name in ("init", "warmup", "finetune"):
        if name not in finished:
            continue
        records = [
            record
            for record in finished[name].record["history"]
            if record["loop"] == "round"
        ]
        curves[name] = [(offset + r["step"], r["test_accuracy"]) for r in records]
        offset += records[-1]["step"]
    return curves


def _per_class(data: StudyData, finished: dict[str, Done]) -> dict[str, np.ndarray]:
    results = {name: done.record["results"] for name, done in finished.items()}
    found = {name: results[name] for name in ("init", "warmup") if name in results}
    if "meta" in results:
        found["teacher"] = results["meta"]["teacher"]
    found |= {
        name: results[name]
        for name in ("distill", "server", "finetune")
        if name in results
    }
    label = np.asarray(data.held_out["test"].label)
    num_classes = data.info.num_classes
    return {
        name: evaluation.per_class_accuracy(
            np.array(result["predictions"]), label, num_classes
        )
        for name, result in found.items()
    }


def _generator_figure(
    study: Experiment, done: Done, end: str, members: np.ndarray
) -> tuple[str, str, Figure]:
    """Of the clients `members`, whose artifacts' names have the `end`."""
    data, config = study.data, study.settings
    generators = done.artifacts()[f"client_generators{end}"]
    model_gan = gan.build(config, data.info, study.classifier)
    key = prng.named(prng.root(config.seed), "report")
    generated = np.asarray(
        sample_grid(model_gan, generators.model, key, NUM_GRID_IMAGES)
    )[:NUM_GRID_CLIENTS]
    rows = data.clients.client.index[members[:NUM_GRID_CLIENTS], :NUM_GRID_IMAGES]
    real = data.clients.images.image[rows]
    titles = [
        f"client {i}" + ("" if alive else " (collapsed)")
        for i, alive in zip(members, generators.alive.tolist(), strict=True)
    ][:NUM_GRID_CLIENTS]
    collapsed = done.record["results"]["collapsed_clients"]
    caption = (
        "Real images of each client beside images of its generator, from the same"
        f" noise in every row. Collapsed generators, left out: {collapsed or 'none'}."
    )
    return (
        f"generated{end}",
        caption,
        figures.generated_beside_real(generated, real, titles),
    )


def embedded(figure: Figure, caption: str) -> str:
    """The figure with its caption, as HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _page(study: Experiment, summary: dict[str, Any], parts: list[str]) -> str:
    title = f"{summary['method']} on {summary['dataset']}, seed {summary['seed']}"
    shown = {
        name: value
        for name, value in summary.items()
        if name not in ("partition", "test_accuracy", "validation_accuracy")
    }
    partition = summary["partition"]
    body = f"""
<p>{partition["num_clients"]} clients, split {html.escape(partition["mode"])} at alpha
{partition["alpha"]}, {summary["rounds"]} federated rounds.</p>
{_accuracy_table(summary)}
{"".join(parts)}
<h2>Costs and environment</h2><pre>{html.escape(json.dumps(shown, indent=2))}</pre>"""
    return document(title, body)


def document(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{html.escape(title)}</h1>
{body}
</main></body></html>
"""


def _accuracy_table(summary: dict[str, Any]) -> str:
    sets = [name for name in ("test", "validation") if f"{name}_accuracy" in summary]
    head = "".join(f'<th scope="col">{name}</th>' for name in sets)
    rows = []
    for model in summary["test_accuracy"]:
        values = [summary[f"{name}_accuracy"].get(model) for name in sets]
        cells = "".join(
            "<td></td>" if value is None else f"<td>{100 * value:.2f} %</td>"
            for value in values
        )
        rows.append(f'<tr><th scope="row">{html.escape(model)}</th>{cells}</tr>')
    return (
        f'<table><thead><tr><th scope="col">accuracy</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
