"""The summary of a study: its results and its cost, as in `summary.json`."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mosaic_jax.core import errors, files, schema
from mosaic_jax.data.federated import StudyData
from mosaic_jax.fl.accounting import Plan
from mosaic_jax.run import environment
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.store import FinishedStage, Record

Accuracies = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The summary of one study, that is of one seed.

    Attributes:
      method: "mosaic" or "federated".
      dataset: name of the data set.
      seed: of the study.
      partition: of the images: mode, alpha, num_clients, label_counts, sha256.
      test_accuracy: of each model that the stages trained, in [0, 1], in their order.
      validation_accuracy: likewise on the validation images; {} if there are none.
      collapsed_generators: numbers of the clients whose generators collapsed.
      rounds: number of federated rounds of all stages, less those that callbacks saved.
      distilled_kept: the last rounds were undone, as they cost the distilled model
        more validation accuracy than `finetune.max_drop` allows.
      headline: numbers of the stages by name, each with mean, low, high and meaning.
      padding_waste: processed samples per training sample, >= 1, of stages whose
        clients take unequal numbers of steps.
      communication_bytes: {"up", "down"}, each by payload, of all clients together.
      budgets: for each rate, what a client holds, sends and computes.
      seconds: of each stage.
      time: of each stage, seconds by kind: computing, compiling, waiting.
      flops: of each stage, see `Stage.flops`.
      compile_seconds: of all stages together.
      peak_memory_bytes: the highest of all stages.
      device: number and kind of the devices of the process that wrote the summary.
      versions: of Python and the packages that results depend on.
      stages: fingerprint of each finished stage.
      config_sha256: of all settings.
      privacy: of private studies {"epsilon", "delta", "noise", "by_payload", "of"}:
        what all that is told tells of a client's image, or of the client, [C]; with
        which probability it may tell more; each client's noise multiplier, [C]; epsilon
        of each payload by itself, [C]; and what is private, in words. {}: the study is
        not private.
      attackers: numbers of the clients that attack.
      withstands: how many in a round the rule is to withstand; None: nobody attacks,
        or the rule is the mean, which withstands none.
      leakage: of attacks on what clients send, a row for each "payload", "attack" and
        "client", None for all together: "auc" and, by false-positive rate,
        "tpr_at_fpr", each {"value", "low", "high"} or None where there is nothing to
        tell it by; numbers of "members", "others" and "canaries"; "epsilon_claimed",
        "epsilon_lower", which canaries bound it by with 95 % confidence,
        "epsilon_lower_together", by which they bound it so that all rows hold at once
        with 95 %, and "epsilon_reach", the most that the first could be with so many.
    """

    method: str
    dataset: str
    seed: int
    partition: dict[str, Any]
    test_accuracy: Accuracies
    validation_accuracy: Accuracies
    collapsed_generators: list[int]
    rounds: int
    distilled_kept: bool
    headline: dict[str, dict[str, Any]]
    padding_waste: dict[str, float]
    communication_bytes: dict[str, dict[str, int]]
    budgets: list[dict[str, Any]]
    seconds: dict[str, float]
    time: dict[str, dict[str, float]]
    flops: dict[str, float]
    compile_seconds: float
    peak_memory_bytes: int
    device: str
    versions: dict[str, str]
    stages: dict[str, str]
    config_sha256: str
    privacy: dict[str, Any] = dataclasses.field(default_factory=dict)
    attackers: list[int] = dataclasses.field(default_factory=list)
    leakage: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    withstands: int | None = None

    @property
    def accuracies(self) -> dict[str, Accuracies]:
        """Accuracies by held-out set: "test", and "validation" if there is one."""
        sets = {"test": self.test_accuracy, "validation": self.validation_accuracy}
        return {name: values for name, values in sets.items() if values}


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """The summary of studies that differ in their seed only.

    Fields are as in `Summary`, but numbers that differ between seeds are replaced by
    {"mean", "spread"}; the spread is the sample standard deviation. The numbers of
    `headline` are merged without their intervals. `rounds` and the bytes of a payload
    are means. `distilled_kept` is a list of seeds.
    """

    method: str
    dataset: str
    seeds: list[int]
    test_accuracy: dict[str, Any]
    validation_accuracy: dict[str, Any]
    headline: dict[str, Any]
    rounds: float
    distilled_kept: list[int]
    communication_bytes: dict[str, dict[str, float]]
    seconds: dict[str, Any]
    time: dict[str, Any]
    flops: dict[str, Any]
    compile_seconds: float
    peak_memory_bytes: int
    device: str
    versions: dict[str, str]

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Accuracies by held-out set: "test", and "validation" if there is one."""
        sets = {"test": self.test_accuracy, "validation": self.validation_accuracy}
        return {name: values for name, values in sets.items() if values}


def build(
    settings: Settings,
    data: StudyData,
    finished: Sequence[FinishedStage],
    privacy: Plan | None = None,
) -> Summary:
    """The summary of a study.

    Args:
      settings: of the study.
      data: of the study.
      finished: its finished stages in their order, at least one.
      privacy: its noise; None: it is not private.
    """
    by_name = {stage.name: stage.record for stage in finished}
    records = list(by_name.values())
    return Summary(
        method=settings.method,
        dataset=settings.data.name,
        seed=settings.seed,
        partition={
            "mode": settings.data.split,
            "alpha": settings.data.alpha,
            "num_clients": settings.data.num_clients,
            "label_counts": data.label_count.tolist(),
            "sha256": data.sha256,
        },
        test_accuracy=_accuracies(records, "test"),
        validation_accuracy=_accuracies(records, "validation"),
        collapsed_generators=sorted(
            client
            for record in records
            for client in record.results.get("collapsed_clients", [])
        ),
        attackers=list(data.attackers),
        withstands=(
            settings.aggregation.withstands(settings)
            if data.attackers and settings.aggregation.rule != "mean"
            else None
        ),
        leakage=[
            row for record in records for row in record.results.get("leakage", [])
        ],
        rounds=settings.total_rounds - _left_out(records),
        distilled_kept=any(
            record.results.get("last_rounds", {}).get("undone", False)
            for record in records
        ),
        headline={
            name: value for record in records for name, value in record.headline.items()
        },
        padding_waste={
            name: record.results["padding_waste"]
            for name, record in by_name.items()
            if "padding_waste" in record.results
        },
        communication_bytes={
            "up": _total([record.up for record in records]),
            "down": _total([record.down for record in records]),
        },
        budgets=next(
            (r.results["budgets"] for r in records if "budgets" in r.results), []
        ),
        seconds={name: record.seconds for name, record in by_name.items()},
        time={name: record.time for name, record in by_name.items()},
        flops={name: record.flops for name, record in by_name.items()},
        compile_seconds=sum(record.time["compiling"] for record in records),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        device=environment.device(),
        versions=environment.versions(),
        stages={stage.name: stage.directory.name for stage in finished},
        config_sha256=schema.digest(schema.to_mapping(settings)),
        privacy=_privacy(privacy) if privacy else {},
    )


def over_seeds(summaries: Sequence[Summary]) -> OverSeeds:
    """The summary of two or more studies that differ in their seed only."""

    def merge(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: merge([v[name] for v in values]) for name in values[0]}
        return {"mean": statistics.mean(values), "spread": statistics.stdev(values)}

    first = summaries[0]
    return OverSeeds(
        method=first.method,
        dataset=first.dataset,
        seeds=[summary.seed for summary in summaries],
        test_accuracy=merge([summary.test_accuracy for summary in summaries]),
        validation_accuracy=merge(
            [summary.validation_accuracy for summary in summaries]
        ),
        headline={
            name: merge([summary.headline[name]["mean"] for summary in summaries])
            for name in first.headline
            if all(name in summary.headline for summary in summaries)
        },
        rounds=statistics.mean(summary.rounds for summary in summaries),
        distilled_kept=[
            summary.seed for summary in summaries if summary.distilled_kept
        ],
        communication_bytes={
            way: means([summary.communication_bytes[way] for summary in summaries])
            for way in first.communication_bytes
        },
        seconds=merge([summary.seconds for summary in summaries]),
        time=merge([summary.time for summary in summaries]),
        flops=merge([summary.flops for summary in summaries]),
        compile_seconds=sum(summary.compile_seconds for summary in summaries),
        peak_memory_bytes=max(summary.peak_memory_bytes for summary in summaries),
        device=first.device,
        versions=first.versions,
    )


def means(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over seeds of each payload or stage; those that a seed lacks are 0 there."""
    names = dict.fromkeys(name for one in counts for name in one)
    return {n: statistics.mean(one.get(n, 0) for one in counts) for n in names}


def write(path: pathlib.Path, summary: Summary | OverSeeds) -> None:
    """Write a summary as JSON."""
    files.write_json(path, dataclasses.asdict(summary))


def read(path: pathlib.Path) -> Summary:
    """Read the summary of one study.

    Raises:
      CheckpointError: the file is missing or damaged.
      DataError: it is from another version of the library.
    """
    content = files.read_json(path)
    fields = dataclasses.fields(Summary)
    names = {field.name for field in fields}
    needed = {
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if not needed <= set(content) <= names:
        raise errors.DataError(
            f"{path}: made by another version: its study must be run again, with its"
            " command"
        )
    return Summary(**content)


def _privacy(plan: Plan) -> dict[str, Any]:
    return {
        "epsilon": list(plan.epsilon),
        "delta": plan.delta,
        "noise": list(plan.noise),
        "of": plan.neighbours,
        "by_payload": {name: list(each) for name, each in plan.by_payload.items()},
    }


def _accuracies(records: Sequence[Record], held_out: str) -> Accuracies:
    """Accuracy of each model; of models with the same name, the last counts."""
    result: Accuracies = {}
    for record in records:
        for name, assessed in record.models.items():
            if f"{held_out}_accuracy" in assessed:
                result.pop(name, None)  # it moves to its later place
                result[name] = assessed[f"{held_out}_accuracy"]
    return result


def _left_out(records: Sequence[Record]) -> int:
    """Number of rounds that callbacks ended stages before."""
    stopped = [r.results["stopped"] for r in records if "stopped" in r.results]
    return sum(one["of"] - one["after"] for one in stopped)


def _total(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Bytes by payload, summed over stages."""
    total: dict[str, int] = {}
    for part in parts:
        for payload, count in part.items():
            total[payload] = total.get(payload, 0) + count
    return total
