"""Run directories with every finding that a report can show, written in no time."""

import dataclasses

import numpy as np

from mosaic_jax.core import files
from mosaic_jax.run import store
from mosaic_jax.run import summary as summaries
from mosaic_jax.run.store import Record
from mosaic_jax.run.summary import Summary
from mosaic_jax.stages import sections

FINGERPRINT = "abc"
MOMENTS = ("after 50 %", "after 100 %")


def record(**changes):
    """Of a stage that found nothing, sent nothing and shows nothing."""
    plain = Record(
        identity={},
        provides=[],
        models={},
        results={},
        headline={},
        clients={},
        section=None,
        up={},
        down={},
        sent_before=[],
        flops=2e12,
        history=[],
        seconds=3.0,
        time={"computing": 1.5, "compiling": 1.0, "waiting": 0.5},
        peak_memory_bytes=10**9,
        files={},
    )
    return dataclasses.replace(plain, **changes)


def history():
    """Of six rounds, measured after every other."""
    return [
        {"loop": "round", "step": step, "loss": 1.0, "test_accuracy": step / 10}
        for step in (2, 4, 6)
    ]


def section(title, *blocks):
    """As a record has it."""
    return sections.to_json(sections.Section(title, blocks))


def heat(name, values):
    return sections.Heat(name, values, "class", "expert", "accuracy", f"Of {name}.")


def film(names):
    head = ("client", "real", *MOMENTS)
    return sections.Strips("generated", head, names, head[1:], "Real and generated.")


def write_stage(root, name, content, pictures=(), *, seed=0):
    """A finished stage of the run directory `root`."""
    directory = store.directory_of(root, name, FINGERPRINT)
    directory.mkdir(parents=True)
    identity = {"stage": name, "fingerprint": FINGERPRINT, "seed": seed}
    content = dataclasses.replace(content, identity=identity)
    store.seal(directory, content, dict(pictures))


def records(np_rng, num_clients, num_classes, label):
    """Of all stages, by name, and the pictures of those that have any."""

    def model():
        predictions = np.where(np_rng.rand(len(label)) < 0.8, label, 0)
        return {"test_accuracy": 0.6, "predictions": predictions.tolist()}

    def of_each(text):
        return {str(number): text for number in range(num_clients)}

    first, distilled = model(), model()
    matrix = np_rng.rand(num_classes, num_classes).tolist()
    matrix[0][0] = None
    names = [f"client {i}" for i in range(min(num_clients, 20))]
    gone = sections.Text("Collapsed generators, left out: 1.")
    found = {
        "init": record(
            models={"init": first, "final": first},
            clients={"own model after init": of_each("50.00 %")},
            up={"models": 6000, "label_counts": 48},
            sent_before=["label_counts"],
            history=history(),
        ),
        "generators": record(
            clients={"generator": of_each("kept")},
            section=section("Generators", film(names), gone),
            up={"generators": 3000},
        ),
        "experts": record(
            section=section("Experts and teacher", heat("experts", matrix))
        ),
        "prototypes": record(up={"prototypes": 500}),
        "meta": record(
            models={"teacher": model()},
            section=section("Experts and teacher", heat("reliance", matrix)),
        ),
        "distill": record(models={"distilled": distilled, "final": distilled}),
        "finetune": record(
            models={"final": model()}, up={"models": 2000}, history=history()
        ),
        "audit": record(
            clients={"membership AUC": {"0": "0.512"}},
            section=section(
                "Audit",
                sections.Table(
                    ("measure", "value", "what it means"),
                    [("auc", "0.51", "chance that an attacker tells a client's image")],
                    "Measures",
                ),
                sections.Scatter("audit", [10], [0.5], "images", "AUC", 0.5, "AUCs."),
            ),
        ),
    }
    size = (len(names), 8, 16, 16, 3)
    film_names = ("real", *MOMENTS)
    images = {n: np_rng.randint(0, 256, size).astype(np.uint8) for n in film_names}
    return found, {"generators": images}


def write_run(
    path, *, num_clients=4, num_classes=3, method="mosaic", seed=0, alpha=0.1, name="x"
):
    """A finished study's files in the folder `path`, which is returned."""
    np_rng = np.random.RandomState(seed)
    count = np_rng.randint(0, 50, (num_clients, num_classes))
    count[0] = 30
    label = np_rng.randint(0, num_classes, 200)
    found, pictures = records(np_rng, num_clients, num_classes, label)
    for stage, content in found.items():
        write_stage(path, stage, content, pictures.get(stage, {}), seed=seed)
    data = {"name": name, "split": "dirichlet_balanced", "alpha": alpha}
    settings = {
        "method": method,
        "seed": seed,
        "data": data | {"num_clients": num_clients},
        "model": {"name": "cnn", "others": [], "rate": 1.0},
        "init": {"method": "fedavg"},
        "server": {"method": "none", "when": "once", "rounds": 1},
        "meta": {"steps": 10},
        "distill": {"steps": 10},
        "methods": {},
    }
    config = {"settings": settings, "command": ["launch.py"], "git_revision": "abc"}
    files.write_json(path / "config.json", config)
    split = {
        "sha256": "0" * 64,
        "label_counts": count.tolist(),
        "held_out_labels": {"test": label.tolist()},
    }
    files.write_json(path / "split.json", split)
    summaries.write(path / "summary.json", summary(settings, found))
    return path


def summary(settings, found):
    """Of the stages whose records are `found`."""
    data, cost = settings["data"], dict.fromkeys(found, 3.0)
    auc = {"mean": 0.512, "low": 0.5, "high": 0.525, "meaning": "0.5: nothing leaks"}
    return Summary(
        method=settings["method"],
        dataset=data["name"],
        seed=settings["seed"],
        partition={
            "mode": data["split"],
            "alpha": data["alpha"],
            "num_clients": data["num_clients"],
            "sha256": "0" * 64,
        },
        test_accuracy={"init": 0.5, "teacher": 0.7, "distilled": 0.6, "final": 0.8},
        validation_accuracy={"init": 0.4, "final": 0.75},
        collapsed_generators=[1],
        attackers=[],
        rounds=12,
        distilled_kept=False,
        headline={
            "auc": auc | {"card": "membership-inference AUC"},
            "coverage": auc | {"mean": 0.9},
        },
        padding_waste={"generators": 1.01},
        communication_bytes={
            "up": {"models": 8000, "generators": 3000},
            "down": {"models": 8000},
        },
        budgets=[],
        seconds=cost,
        time={name: one.time for name, one in found.items()},
        flops=dict.fromkeys(found, 2e12),
        compile_seconds=1.0,
        peak_memory_bytes=10**9,
        device="1 x cpu",
        versions={"python": "3.11", "jax": "0.0"},
        stages=dict.fromkeys(found, FINGERPRINT),
        config_sha256="0" * 64,
    )
