"""What decides how much of the teacher reaches the global model, one change at a time.

    python -m benchmarks.ablation --name digits --alpha 0.01 --seeds 0,1

Every row changes the study in one respect and reuses each stage that the change leaves
alone. Columns, per cent, mean over seeds: the teacher's accuracy on real validation and
test images; its agreement on generated images with a reference network trained on all
clients' images together (a measuring instrument, no part of any method); the student
after distillation and the final model, on validation and test images. Choices are made
on the validation columns. Writes benchmarks/results/ablation_NAME.json.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import accuracy
from mosaic_jax.cli import launch
from mosaic_jax.core import files, prng
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.fl import evaluation, gan
from mosaic_jax.run import environment
from mosaic_jax.run.runner import Experiment
from mosaic_jax.run.settings import Settings


def _twice(value: int) -> int:
    return 2 * value


def _third(value: int) -> int:
    return value // 3


# name: {group: {field: value, or a function of the configured value}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "as configured": {},
    "upper bound: held-out real images": {
        "distill": {"source": "validation", "pool": 0}
    },
    # The clients' GANs.
    "GAN steps / 3": {"generators": {"steps": _third}},
    "GAN steps x 2": {"generators": {"steps": _twice}},
    "the last generator, no running mean": {"generators": {"ema_decay": 0.0}},
    "clients that stop where they see no gain": {"generators": {"patience": 5}},
    "batch-norm moments matched by all clients": {
        "generators": {"inversion_weight": 0.01, "inversion_below": 10**9}
    },
    "entropy 1, diversity 5 by labels (paper)": {
        "generators": {"entropy_weight": 1.0, "diversity_weight": 5.0}
    },
    "diversity 5, uniform (published)": {
        "generators": {"diversity_weight": 5.0},
        "compat": {"diversity_target": "uniform"},
    },
    "shifted discriminator input": {"generators": {"translate": 1}},
    "GAN learning rate 2e-4 (published)": {"generators": {"learning_rate": 2e-4}},
    # The teacher.
    "10 prototypes of a class, 1,000 steps": {
        "prototypes": {"clusters": 10},
        "meta": {"steps": 1000},
    },
    "prototypes in the global space (published)": {"prototypes": {"space": "global"}},
    "prototypes in the client's space": {"prototypes": {"space": "client"}},
    "transformer head, 150 steps (published)": {
        "meta": {"head": "transformer", "steps": 150}
    },
    "gate by the global model": {"meta": {"gate": "global_topk"}},
    "experts after 60 more local steps": {"experts": {"local_steps": 60}},
    # The images that teach.
    "generators refined by the teacher": {"refine": {"steps": 60}},
    "new images in every step": {"distill": {"pool": 0}},
    "classes balanced": {"distill": {"balanced": True}},
    "images on which student and teacher disagree": {"distill": {"focus": 1.0}},
    "shifted images": {"distill": {"augment": "translate"}},
    "images weighted by n_i": {"distill": {"weighting": "size"}},
    "images the teacher is sure of (0.5)": {"distill": {"min_confidence": 0.5}},
    # The student.
    "distillation steps x 2": {"distill": {"steps": _twice}},
    "student learning rate 1e-4 (published)": {"distill": {"learning_rate": 1e-4}},
    "student batch-norm in train mode": {"distill": {"batch_norm": "train"}},
}
COLUMNS = ("teacher", "generated", "distilled", "final")
SAMPLES_PER_GENERATOR = 64


def change(config: Settings, variant: dict[str, dict]) -> Settings:
    """`config` with some fields of some groups replaced."""
    groups = {}
    for name, fields in variant.items():
        group = getattr(config, name)
        values = {
            field: value(getattr(group, field)) if callable(value) else value
            for field, value in fields.items()
        }
        groups[name] = dataclasses.replace(group, **values)
    return dataclasses.replace(config, **groups)


def reference(config: Settings, root: pathlib.Path) -> ModelState:
    """A network trained on all clients' images together (one client of federated)."""
    central = change(
        dataclasses.replace(config, method="federated"),
        {
            "data": {"num_clients": 1, "split": "iid"},
            "local": {"steps": 60},
            "init": {"rounds": 10},
            "warmup": {"rounds": 0},
            "finetune": {"rounds": 0},
        },
    )
    work = Experiment(central, root / "reference")
    work.run()
    return artifact(work, "init", "global_model")


def artifact(work: Experiment, stage: str, name: str) -> Tree:
    """What a finished stage handed on.

    Args:
      work: the study.
      stage: its name.
      name: of the artifact.
    """
    done = {one.name: one for one in work.finished()}
    links = {link.name: link for link in work.study.chain}
    template = {name: work.study.template(links[stage])[name]}
    return done[stage].artifacts(template)[name]


def agreement(work: Experiment, judge: ModelState) -> float:
    """Share of generated images on which teacher and `judge` name the same class."""
    teacher = artifact(work, "meta", "teacher")
    generators = artifact(work, "generators", "client_generators")
    study = work.study
    (distill,) = [link for link in study.chain if link.name == "distill"]
    blueprint = study.blueprint(distill)
    ensemble = study.settings.meta.ensemble(blueprint)
    model_gan = gan.build(blueprint.settings, study.data.info, study.classifier)

    @jax.jit
    def run(key: Array) -> Array:
        def one(generator: ModelState) -> Array:
            shape = (SAMPLES_PER_GENERATOR, model_gan.latent_dim)
            image = model_gan.sample(generator, jax.random.normal(key, shape))
            return jnp.argmax(ensemble.logits(teacher, image), -1), jnp.argmax(
                evaluation.predict(
                    lambda x: study.classifier.logits(judge, x),
                    augment.to_uint8(image),
                    batch_size=SAMPLES_PER_GENERATOR,
                ),
                -1,
            )

        named, judged = jax.lax.map(one, generators.model)
        alive = generators.alive[:, None]
        return jnp.sum((named == judged) & alive) / jnp.sum(
            alive * jnp.ones_like(named)
        )

    return float(run(prng.named(prng.root(study.settings.seed), "ablation")))


def measure(
    config: Settings, name: str, seed_root: pathlib.Path, judge: ModelState
) -> dict[str, Any]:
    """One row of one seed.

    Args:
      config: the study that is changed.
      name: of `VARIANTS`.
      seed_root: of the run directories of this seed.
      judge: of `reference`.
    """
    place = list(VARIANTS).index(name)
    earlier = [seed_root / "mosaic", *seed_root.glob("variant_*")]
    work = Experiment(
        change(config, VARIANTS[name]),
        seed_root / f"variant_{place}",
        reuse_from=[path for path in earlier if (path / "stages").is_dir()],
    )
    summary = work.run()
    generated = agreement(work, judge)
    return {
        "variant": name,
        "seed": config.seed,
        "collapsed": len(summary.collapsed_generators),
        **{
            part: found | {"generated": generated}
            for part, found in summary.accuracies.items()
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per variant, means over seeds, validation / test."""
    lines = ["| change | seeds | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]

        def mean(part: str, column: str, mine: list = mine) -> str:
            return f"{100 * statistics.mean(row[part][column] for row in mine):.1f}"

        cells = [
            mean("test", column)
            if column == "generated"
            else f"{mean('validation', column)} / {mean('test', column)}"
            for column in COLUMNS
        ]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every variant, then print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="digits")
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--workdir", default="runs/accuracy")
    parser.add_argument(
        "--variants", type=int, default=len(VARIANTS), help="only the first so many"
    )
    args = parser.parse_args()
    launch.prepare()
    rows: list[dict[str, Any]] = []
    path = pathlib.Path(__file__).parent / "results" / f"ablation_{args.name}.json"
    path.parent.mkdir(exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        config = accuracy.study_of(args.name, args.alpha, seed, "mosaic")
        workdir = pathlib.Path(args.workdir)
        root = accuracy.folder(workdir, args.name, args.alpha, seed)
        judge = reference(config, root)
        for name in list(VARIANTS)[: args.variants]:
            rows.append(measure(config, name, root, judge))
            print(json.dumps(rows[-1]), flush=True)
            content = {"device": environment.device(), "rows": rows}
            files.write_json(path, content)
    print(table(rows))


if __name__ == "__main__":
    main()
