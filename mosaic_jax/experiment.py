"""A study in a run directory: order of stages, fingerprints, resume, reuse, summary."""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import statistics
import time
import typing
from collections.abc import Sequence
from typing import Any

import flax.traverse_util

from mosaic_jax import (
    algorithms,
    checkpoint,
    environment,
    errors,
    memory,
    models,
    parallel,
    prng,
    settings,
    stages,
    tracking,
    types,
)
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import federated
from mosaic_jax.data.sources import Info
from mosaic_jax.loop import Interrupted, Interruption, Loop
from mosaic_jax.stages.base import Context, Outcome, Stage

_log = logging.getLogger(__name__)

# Raised when the same settings give another result; it enters every fingerprint.
FORMAT = 2
ARTIFACT_TYPES = {
    "global_model": types.ModelState,
    "client_models": types.ModelState,
    "client_generators": types.Generators,
    "experts": types.Experts,
    "prototypes": types.Prototypes,
    "teacher": types.Teacher,
    "student": types.ModelState,
    "final_model": types.ModelState,
}


@dataclasses.dataclass(frozen=True)
class Done:
    """What is on disk of a finished stage."""

    name: str
    directory: pathlib.Path
    record: dict[str, Any]

    def artifacts(self) -> dict[str, types.Tree]:
        """Load them.

        Raises:
          CheckpointError: they are damaged or missing.
        """
        saved = checkpoint.Checkpoints(self.directory / "artifacts")
        latest = saved.latest()
        saved.close()
        if latest is None:
            raise errors.CheckpointError(f"{self.directory}: artifacts are damaged")
        nested = flax.traverse_util.unflatten_dict(latest[1], sep="/")
        return {
            name: _rebuild(ARTIFACT_TYPES[name], nested.get(name, {}))
            for name in self.record["provides"]
        }


class Experiment:
    """One study in one run directory."""

    def __init__(
        self,
        config: settings.Settings,
        workdir: str | pathlib.Path,
        *,
        reuse_from: Sequence[str | pathlib.Path] = (),
        command: Sequence[str] = (),
    ) -> None:
        """Check everything that can be checked before work starts.

        Raises:
          ConfigError: a name is not known or `workdir` holds another study.
          DataError: the data are missing or cannot be split.
        """
        if config.init.method not in algorithms.ALGORITHMS:
            known = list(algorithms.ALGORITHMS)
            raise errors.ConfigError(
                f"init.method = {config.init.method!r}: {settings.near('', known)}"
            )
        self.settings = config
        self.workdir = pathlib.Path(workdir)
        known = [stage.name for stage in stages.pipeline(config)]
        if config.profile and config.profile not in known:
            raise errors.ConfigError(
                f"profile = {config.profile!r}: {settings.near(config.profile, known)}"
            )
        self.reuse_from = [pathlib.Path(path) for path in reuse_from]
        for path in self.reuse_from:
            if not (path / "stages").is_dir():
                raise errors.ConfigError(f"--reuse_from = {path}: no run directory")
        _check_same_study(self.workdir, config)
        self.data = federated.load(config.data, config.seed)
        _check_fits(config, self.data)
        self.classifier = build_classifier(config, self.data.info)
        parallel.first_devices(config.compute.devices)
        self._command = list(command)

    @functools.cached_property
    def _axis(self) -> parallel.ClientAxis:
        """Where clients run; not looked for where every stage is done already."""
        config = self.settings
        return parallel.build(
            self.data.clients.client.size,
            at_once=memory.clients_at_once(config, self.data.info, self.classifier),
            num_devices=config.compute.devices,
        )

    @functools.cached_property
    def _placed(self) -> dict[str, types.Tree]:
        """The data on the devices, as a `Context` names them."""
        return {
            "clients": self._axis.place(self.data.clients),
            "held_out": self._axis.replicate(self.data.held_out),
        }

    def run(self) -> dict[str, Any]:
        """Run, resume or load every stage; returns the summary.

        Raises:
          Interrupted: a signal asked to stop; the state is saved.
          DivergedError: training is no longer finite.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        with environment.locked(self.workdir), Interruption() as interruption:
            if environment.is_primary():
                self._write_config()
                federated.save_split(self.workdir / "split.json", self.data)
            environment.wait_for_all("start")
            tracker = tracking.Tracker(
                self.workdir,
                tensorboard=self.settings.log.tensorboard,
                writes=environment.is_primary(),
            )
            with contextlib.closing(tracker):
                return self._run_stages(tracker, interruption)

    def plan(self) -> list[tuple[Stage, str]]:
        """Each stage with its fingerprint."""
        base = {
            "format": FORMAT,
            "seed": self.settings.seed,
            "model": settings.to_mapping(self.settings.model),
            "data": self.settings.data.name,
            "images": self.data.images_sha256,
            "split": self.data.sha256,
        }
        producer: dict[str, str] = {}
        result = []
        for stage in stages.pipeline(self.settings):
            missing = [name for name in stage.needs if name not in producer]
            if missing:
                raise errors.ConfigError(f"stage {stage.name} needs {missing[0]}")
            needs = {name: producer[name] for name in stage.needs}
            fingerprint = settings.digest(
                {**base, "stage": stage.name, "depends": stage.depends, "needs": needs}
            )[:16]
            producer |= {name: fingerprint for name in stage.provides}
            result.append((stage, fingerprint))
        return result

    def finished(self) -> list[Done]:
        """The stages of this study that are done, in order, up to the first gap."""
        result = []
        for stage, fingerprint in self.plan():
            done = _find(self.workdir, stage, fingerprint)
            if done is None:
                break
            result.append(done)
        return result

    def _run_stages(
        self, tracker: tracking.Tracker, interruption: Interruption
    ) -> dict[str, Any]:
        artifacts: dict[str, types.Tree] = {}
        finished = []
        summary: dict[str, Any] = {}
        for stage, fingerprint in self.plan():
            done = self._load(stage, fingerprint, tracker)
            produced = None
            if done is not None:
                try:
                    produced = done.artifacts()
                except errors.CheckpointError as error:
                    _log.warning("%s; stage %s runs again", error, stage.name)
                    environment.wait_for_all(f"{stage.name} damaged")
                    if environment.is_primary():
                        shutil.rmtree(done.directory)
            if produced is None:
                signum = environment.highest(interruption.signum)
                if signum:
                    raise Interrupted(signum)
                inputs = {name: artifacts[name] for name in stage.needs}
                done, produced = self._compute(
                    stage, fingerprint, inputs, tracker, interruption
                )
            artifacts |= produced
            finished.append(done)
            summary = self.summarise(finished)
            if environment.is_primary():
                tracking.write_json(self.workdir / "summary.json", summary)
        return summary

    def _load(
        self, stage: Stage, fingerprint: str, tracker: tracking.Tracker
    ) -> Done | None:
        for root in [self.workdir, *self.reuse_from]:
            done = _find(root, stage, fingerprint)
            if done is None:
                continue
            _log.info("%s: reused from %s", stage.name, done.directory)
            if root != self.workdir:
                target = _stage_directory(self.workdir, stage.name, fingerprint)
                if environment.is_primary():
                    _copy_whole(done.directory, target)
                done = dataclasses.replace(done, directory=target)
            environment.wait_for_all(f"{stage.name} found")
            tracker.replace(stage.name, done.record["history"])
            return done
        return None

    def _compute(
        self,
        stage: Stage,
        fingerprint: str,
        inputs: dict[str, types.Tree],
        tracker: tracking.Tracker,
        interruption: Interruption,
    ) -> tuple[Done, dict[str, types.Tree]]:
        _log.info("%s: running", stage.name)
        directory = _stage_directory(self.workdir, stage.name, fingerprint)
        directory.mkdir(parents=True, exist_ok=True)
        tracker.replace(stage.name, _resumable(directory, tracker, stage.name))
        loop = Loop(
            stage=stage.name,
            directory=directory / "checkpoints",
            tracker=tracker,
            interruption=interruption,
            checkpoint_seconds=self.settings.log.checkpoint_seconds,
            place=self._axis.replicate,
            profile=self.workdir / "profile"
            if self.settings.profile == stage.name
            else None,
        )
        context = Context(
            settings=self.settings,
            data=self.data,
            axis=self._axis,
            **self._placed,
            classifier=self.classifier,
            key=prng.named(prng.root(self.settings.seed), stage.name),
            loop=loop,
        )
        start = time.monotonic()
        with environment.CompileTime() as compile_time:
            outcome = stage.run(context, **inputs)
        seconds = time.monotonic() - start
        saved = checkpoint.Checkpoints(directory / "artifacts")
        saved.save(0, outcome.artifacts)
        saved.close()
        record = self._record(stage, outcome, tracker) | {
            "seconds": seconds,
            "compile_seconds": compile_time.seconds,
            "peak_memory_bytes": environment.peak_memory(),
        }
        if environment.is_primary():
            tracking.write_json(directory / "done.json", record)
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        environment.wait_for_all(f"{stage.name} done")
        _log.info("%s: done in %.1f s", stage.name, seconds)
        return Done(stage.name, directory, record), outcome.artifacts

    def _record(
        self, stage: Stage, outcome: Outcome, tracker: tracking.Tracker
    ) -> dict[str, Any]:
        return {
            "provides": list(stage.provides),
            "results": outcome.results,
            "up": outcome.up,
            "down": outcome.down,
            "history": tracker.history(stage.name),
        }

    def summarise(self, finished: Sequence[Done]) -> dict[str, Any]:
        """The content of summary.json for the stages that are done."""
        config = self.settings
        records = {done.name: done.record for done in finished}
        up, down = _add_payloads(records, "up"), _add_payloads(records, "down")
        return {
            "method": config.method,
            "dataset": config.data.name,
            "seed": config.seed,
            "partition": {
                "mode": config.data.split,
                "alpha": config.data.alpha,
                "num_clients": config.data.num_clients,
                "label_counts": self.data.label_count.tolist(),
                "sha256": self.data.sha256,
            },
            **{
                f"{name}_accuracy": _accuracies(records, f"{name}_accuracy")
                for name in self.data.held_out
            },
            "collapsed_generators": records.get("generators", {})
            .get("results", {})
            .get("collapsed_clients", []),
            "rounds": config.total_rounds,
            "padding_waste": {
                name: record["results"]["padding_waste"]
                for name, record in records.items()
                if "padding_waste" in record["results"]
            },
            "communication_bytes": {"up": up, "down": down},
            "seconds": {name: r["seconds"] for name, r in records.items()},
            "compile_seconds": sum(r["compile_seconds"] for r in records.values()),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in records.values()),
            "device": environment.device(),
            "versions": environment.versions(),
            "config_sha256": settings.digest(settings.to_mapping(config)),
        }

    def _write_config(self) -> None:
        tracking.write_json(
            self.workdir / "config.json",
            {
                "settings": settings.to_mapping(self.settings),
                "command": self._command,
                "versions": environment.versions(),
                "device": environment.device(),
                "git_revision": environment.git_revision(),
            },
        )


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation of a sample) over studies of several seeds.

    Accuracies become {"mean": ..., "spread": ...}; what differs otherwise is listed by
    seed.
    """

    def merge(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: merge([v[name] for v in values]) for name in values[0]}
        return {"mean": statistics.mean(values), "spread": statistics.stdev(values)}

    first = summaries[0]
    accuracies = [name for name in first if name.endswith("_accuracy")]
    return {
        "method": first["method"],
        "dataset": first["dataset"],
        "seeds": [summary["seed"] for summary in summaries],
        **{name: merge([s[name] for s in summaries]) for name in accuracies},
        "rounds": first["rounds"],
        "communication_bytes": first["communication_bytes"],
        "seconds": merge([s["seconds"] for s in summaries]),
        "compile_seconds": sum(s["compile_seconds"] for s in summaries),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
        "device": first["device"],
        "versions": first["versions"],
    }


def build_classifier(config: settings.Settings, info: Info) -> Classifier:
    """The classifier of a study."""
    module = models.build_classifier(
        config.model.name,
        info.num_classes,
        width=config.model.width,
        dtype=config.model.dtype,
        lowering=config.compute.convolution,
        norm=config.model.norm,
    )
    return Classifier(module, info.mean, info.std)


def _check_same_study(workdir: pathlib.Path, config: settings.Settings) -> None:
    """Stage settings may change within a run directory; what the study is may not."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError):
        _log.warning("%s is damaged; it is written anew", path)
        return
    new = settings.to_mapping(config)
    ignored = {"data.dir"}
    for group in ("method", "seed", "data", "model"):
        before = flax.traverse_util.flatten_dict({group: old.get(group)}, sep=".")
        after = flax.traverse_util.flatten_dict({group: new[group]}, sep=".")
        for name in sorted(after.keys() - ignored):
            if before.get(name) != after[name]:
                raise errors.ConfigError(
                    f"--workdir = {workdir}: holds another study, with {name} ="
                    f" {before.get(name)!r} where this one has {after[name]!r}: must be"
                    " a new folder or the same study"
                )


def _check_fits(config: settings.Settings, data: federated.StudyData) -> None:
    num_classes = data.info.num_classes
    if config.meta.gate_experts > num_classes:
        raise errors.ConfigError(
            f"meta.gate_experts = {config.meta.gate_experts}: must be <= {num_classes},"
            f" the classes of {config.data.name}"
        )


def _copy_whole(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a folder so that `target` is never there in part."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _stage_directory(root: pathlib.Path, name: str, fingerprint: str) -> pathlib.Path:
    return root / "stages" / name / fingerprint


def _find(root: pathlib.Path, stage: Stage, fingerprint: str) -> Done | None:
    """The finished stage, if it is there with all that `stage` provides."""
    directory = _stage_directory(root, stage.name, fingerprint)
    try:
        record = json.loads((directory / "done.json").read_text())
        complete = set(stage.provides) <= set(record["provides"])
        return Done(stage.name, directory, record) if complete else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _resumable(
    directory: pathlib.Path, tracker: tracking.Tracker, stage: str
) -> list[dict[str, Any]]:
    """Records of an earlier, unfinished try of the same stage; else none."""
    return tracker.history(stage) if (directory / "checkpoints").exists() else []


def _rebuild(cls: type, nested: Any) -> Any:
    """Dataclass `cls` from nested dicts; empty subtrees are not on disk."""
    if not dataclasses.is_dataclass(cls):
        return nested
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            field.name: _rebuild(hints[field.name], nested.get(field.name, {}))
            for field in dataclasses.fields(cls)
        }
    )


def _add_payloads(records: dict[str, dict], direction: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for record in records.values():
        for payload, count in record[direction].items():
            total[payload] = total.get(payload, 0) + count
    return total


def _accuracies(records: dict[str, dict], key: str) -> dict[str, float]:
    """The accuracy of each model that the method has, in the order of the stages."""
    result = {}

    def put(name: str, found: dict[str, Any]) -> None:
        if key in found:
            result[name] = found[key]

    def of(stage: str) -> dict[str, Any]:
        return records.get(stage, {}).get("results", {})

    put("init", of("init"))
    put("warmup", of("warmup"))
    put("experts_mean", of("meta").get("mean", {}))
    put("diagonal", of("meta").get("diagonal", {}))
    put("teacher", of("meta").get("teacher", {}))
    put("distilled", of("distill"))
    for last in ("init", "warmup", "distill", "finetune"):
        put("final", of(last))
    return result
