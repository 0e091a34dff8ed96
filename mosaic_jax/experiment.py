"""A study in a run directory: order of stages, fingerprints, resume, reuse, summary."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib
import shutil
import statistics
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import flax.traverse_util
import jax
from clu import parameter_overview

from mosaic_jax import (
    algorithms,
    checkpoint,
    costs,
    distillation,
    environment,
    errors,
    files,
    memory,
    models,
    parallel,
    prng,
    processes,
    provenance,
    settings,
    stages,
    tracking,
    trees,
    types,
)
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import federated
from mosaic_jax.data.sources import Info
from mosaic_jax.distillation.base import Task
from mosaic_jax.loop import Interrupted, Interruption, Loop, Run, run_stage
from mosaic_jax.stages.base import Context, Outcome, Stage
from mosaic_jax.stopwatch import Stopwatch, TimeSheet

_log = logging.getLogger(__name__)

# Raised when the same settings give another result; it enters every fingerprint.
FORMAT = 6
ARTIFACT_TYPES = {
    "global_model": types.ModelState,
    "round_state": dict,
    "client_models": types.ClientModels,
    "client_generators": types.Generators,
    "experts": types.Experts,
    "prototypes": types.Prototypes,
    "teacher": types.Teacher,
    "student": types.ModelState,
    "final_model": types.ModelState,
    "reference_model": types.ModelState,
}


@dataclasses.dataclass(frozen=True)
class Done:
    """What is on disk of a finished stage."""

    name: str
    directory: pathlib.Path
    record: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the files there say that they are of."""
        return self.record["identity"]

    def artifacts(self) -> dict[str, types.Tree]:
        """Load them.

        Raises:
          CheckpointError: they are damaged or missing.
        """
        if not self.record["provides"]:
            return {}
        saved = checkpoint.Checkpoints(self.directory / "artifacts", self.identity)
        latest = saved.latest()
        saved.close()
        if latest is None:
            raise errors.CheckpointError(f"{self.directory}: artifacts are damaged")
        nested = flax.traverse_util.unflatten_dict(latest[1], sep="/")
        return {
            name: _rebuild(ARTIFACT_TYPES[name.partition("@")[0]], nested.get(name, {}))
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
        _check_methods(config)
        self.algorithm = algorithms.build(config)
        self.server = distillation.build(config)
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
        if config.log.wandb and importlib.util.find_spec("wandb") is None:
            raise errors.ConfigError(
                "log.wandb = True: needs the package wandb: pip install wandb"
            )
        _check_same_study(self.workdir, config)
        self.data = federated.load(config.data, config.seed)
        _check_fits(config, self.data, self.algorithm)
        self.networks = build_classifiers(config, self.data.info)
        devices = parallel.first_devices(config.compute.devices)
        if config.compute.seeds_at_once > 1 < len(devices):
            raise errors.ConfigError(
                f"compute.seeds_at_once = {config.compute.seeds_at_once}: must be <= 1"
                f" on {len(devices)} devices, which each seed uses in its own way"
            )
        self._command = list(command)

    @property
    def classifier(self) -> Classifier:
        """The server's."""
        return self.networks[self.settings.model.name]

    @functools.cached_property
    def _axis(self) -> parallel.ClientAxis:
        """Where clients run; not looked for where every stage is done already."""
        config = self.settings
        return parallel.build(
            self.data.clients.client.size,
            at_once=memory.clients_at_once(config, self.data, self.classifier),
            num_devices=config.compute.devices,
        )

    @functools.cached_property
    def _placed(self) -> dict[str, types.Tree]:
        """The data on the devices, as a `Context` names them."""
        # Where a client may run on any device, each must hold all images.
        anywhere = (
            self._state_on_host
            or self.algorithm.partial
            or len(self.networks) > 1
            or self.settings.init.clients_per_round > 0
        )
        return {
            "clients": self._axis.place(self.data.clients, whole=anywhere),
            "held_out": self._axis.replicate(self.data.held_out),
        }

    @property
    def num_parameters(self) -> int:
        """Of the server's classifier."""
        shape = self.data.info.image_shape
        model = jax.eval_shape(lambda: self.classifier.init(prng.root(0), shape))
        return int(parameter_overview.count_parameters(model.params))

    @functools.cached_property
    def flops(self) -> dict[str, float]:
        """Of every stage, finished or not."""
        return costs.flops_by_stage(
            self.settings,
            self.data,
            self.networks,
            self.algorithm,
            self.server,
            self._task,
        )

    @functools.cached_property
    def _task(self) -> Task:
        return build_task(self.settings, self.data.info, self.classifier)

    @functools.cached_property
    def _state_on_host(self) -> bool:
        return memory.state_on_host(
            self.settings, self.data.info, self.classifier, self.algorithm
        )

    def reuse(self, workdir: pathlib.Path) -> None:
        """Let stages that are finished in another run directory be used."""
        if workdir != self.workdir:
            self.reuse_from.append(workdir)

    def run(self) -> dict[str, Any]:
        """`run_together` alone."""
        return run_together([self])[0]

    @property
    def seeds_at_once(self) -> int:
        """How many studies like this one run together, by settings and memory."""
        return memory.seeds_at_once(self.settings, self.data, self.classifier)

    def plan(self) -> list[tuple[Stage, str]]:
        """Each stage with its fingerprint: a digest of all that it can see.

        That is the settings it declares, the code of the components that these name,
        the data, and what the stages before it made.
        """
        producer: dict[str, str] = {}
        result = []
        for stage in stages.pipeline(self.settings):
            missing = [name for name in stage.needs if name not in producer]
            if missing:
                raise errors.ConfigError(f"stage {stage.name} needs {missing[0]}")
            needs = {name: producer[name] for name in stage.needs}
            seen = {
                "format": FORMAT,
                "stage": stage.name,
                "settings": provenance.view(self.settings, stage.reads).content(),
                "components": self._components(stage),
                "data": self.data.content_sha256,
                "needs": needs,
            }
            fingerprint = settings.digest(seen)[:16]
            producer |= {name: fingerprint for name in stage.provides}
            result.append((stage, fingerprint))
        return result

    def _components(self, stage: Stage) -> dict[str, Any]:
        """What makes the components that a stage may use what they are."""
        found: dict[str, Any] = {
            name: provenance.code_digest(type(network.module))
            for name, network in self.networks.items()
        }
        if stage.uses("init.method"):
            found["algorithm"] = provenance.of_component(self.algorithm)
        if stage.uses("server.method") and self.server is not None:
            found["server"] = provenance.of_component(self.server)
        return found

    def identity(self, stage: Stage, fingerprint: str) -> dict[str, Any]:
        """What the files of a stage carry, so that they are not taken for others'."""
        return {
            "study": self.data.content_sha256[:16],
            "stage": stage.name,
            "fingerprint": fingerprint,
            "seed": self.settings.seed,
        }

    def finished(self) -> list[Done]:
        """The stages of this study that are done, in order, up to the first gap."""
        result = []
        for stage, fingerprint in self.plan():
            done = _find(self.workdir, stage, self.identity(stage, fingerprint))
            if done is None:
                break
            result.append(done)
        return result

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tracking.Tracker]:
        """The run directory, locked, with what is known before the first stage."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        with environment.locked(self.workdir):
            if environment.is_primary():
                self._write_config()
                federated.save_split(self.workdir / "split.json", self.data)
            environment.wait_for_all("start")
            tracker = tracking.Tracker(
                self.workdir,
                tensorboard=self.settings.log.tensorboard,
                wandb=self.settings.log.wandb,
                settings=flax.traverse_util.flatten_dict(
                    settings.to_mapping(self.settings), sep="."
                ),
                writes=environment.is_primary(),
            )
            with contextlib.closing(tracker):
                yield tracker

    def _reuse(
        self, stage: Stage, fingerprint: str, tracker: tracking.Tracker
    ) -> tuple[Done, dict[str, types.Tree]] | None:
        """A finished stage and its artifacts; one that is damaged is removed."""
        done = self._load(stage, fingerprint, tracker)
        if done is None:
            return None
        try:
            return done, done.artifacts()
        except errors.CheckpointError as error:
            _log.warning("%s; stage %s runs again", error, stage.name)
            environment.wait_for_all(f"{stage.name} damaged")
            if environment.is_primary():
                shutil.rmtree(done.directory)
            return None

    def _load(
        self, stage: Stage, fingerprint: str, tracker: tracking.Tracker
    ) -> Done | None:
        for root in [self.workdir, *self.reuse_from]:
            done = _find(root, stage, self.identity(stage, fingerprint))
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

    def _loop(
        self,
        stage: Stage,
        fingerprint: str,
        tracker: tracking.Tracker,
        progress: tracking.Progress,
        interruption: Interruption,
        watch: Stopwatch,
        share: float,
    ) -> Loop:
        directory = _stage_directory(self.workdir, stage.name, fingerprint)
        directory.mkdir(parents=True, exist_ok=True)
        return Loop(
            stage=stage.name,
            seed=self.settings.seed,
            directory=directory / "checkpoints",
            tracker=tracker,
            progress=progress,
            interruption=interruption,
            checkpoint_seconds=self.settings.log.checkpoint_seconds,
            place=self._axis.replicate,
            identity=self.identity(stage, fingerprint),
            time_sheet=TimeSheet(
                directory / "time.json",
                watch,
                share=share,
                writes=environment.is_primary(),
            ),
            profile=self.workdir / "profile"
            if self.settings.profile == stage.name
            else None,
        )

    def start(self, stage: Stage, artifacts: dict[str, types.Tree]) -> Run:
        """The stage on what it needs of `artifacts`."""
        context = Context(
            settings=provenance.view(self.settings, stage.reads),
            data=self.data,
            axis=self._axis,
            **self._placed,
            networks=self.networks,
            name=self.settings.model.name,
            algorithm=stage.given("init.method", self.algorithm),
            server=stage.given("server.method", self.server),
            task=stage.given("server.method", self._task),
            state_on_host=self._state_on_host,
            key=prng.named(prng.root(self.settings.seed), stage.name),
        )
        inputs = {name: artifacts[name] for name in stage.needs}
        return stage.run(context, **inputs)

    def _save(
        self,
        stage: Stage,
        fingerprint: str,
        outcome: Outcome,
        tracker: tracking.Tracker,
        cost: dict[str, Any],
    ) -> Done:
        directory = _stage_directory(self.workdir, stage.name, fingerprint)
        identity = self.identity(stage, fingerprint)
        if outcome.artifacts:
            saved = checkpoint.Checkpoints(directory / "artifacts", identity)
            saved.save(0, outcome.artifacts)
            saved.close()
        if outcome.pictures and environment.is_primary():
            files.write_arrays(directory / "pictures.npz", outcome.pictures)
        record = {
            "identity": identity,
            "provides": list(stage.provides),
            "results": outcome.results,
            "up": outcome.up,
            "down": outcome.down,
            "flops": self.flops[stage.name],
            "history": tracker.history(stage.name),
            **cost,
        }
        if environment.is_primary():
            record["files"] = _kept(directory)
            files.write_json(directory / "done.json", record)
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            (directory / "time.json").unlink(missing_ok=True)
        environment.wait_for_all(f"{stage.name} done")
        tracker.pictures(stage.name, outcome.pictures)
        for name in ("global_model", "student", "final_model"):
            if name in outcome.artifacts:
                params = trees.flatten(outcome.artifacts[name].params)
                tracker.histograms(f"{stage.name}/{name}", params)
        return Done(stage.name, directory, record)

    def _write_summary(self, finished: Sequence[Done]) -> dict[str, Any]:
        summary = self.summarise(finished)
        if environment.is_primary():
            files.write_json(self.workdir / "summary.json", summary)
        return summary

    def summarise(self, finished: Sequence[Done]) -> dict[str, Any]:
        """The content of summary.json for the stages that are done."""
        config = self.settings
        records = {done.name: done.record for done in finished}
        up, down = _add_payloads(records, "up"), _add_payloads(records, "down")
        audited = records.get("audit", {}).get("results", {}).get("headline")
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
            "collapsed_generators": sorted(
                client
                for record in records.values()
                for client in record["results"].get("collapsed_clients", [])
            ),
            "rounds": config.total_rounds,
            **({"audit": audited} if audited else {}),
            "padding_waste": {
                name: record["results"]["padding_waste"]
                for name, record in records.items()
                if "padding_waste" in record["results"]
            },
            "communication_bytes": {"up": up, "down": down},
            "budgets": records.get("init", {}).get("results", {}).get("budgets", []),
            "seconds": {name: r["seconds"] for name, r in records.items()},
            "time": {name: r["time"] for name, r in records.items()},
            "flops": {name: r["flops"] for name, r in records.items()},
            "compile_seconds": sum(r["time"]["compiling"] for r in records.values()),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in records.values()),
            "device": environment.device(),
            "versions": environment.versions(),
            "stages": {done.name: done.directory.name for done in finished},
            "config_sha256": settings.digest(settings.to_mapping(config)),
        }

    def _write_config(self) -> None:
        files.write_json(
            self.workdir / "config.json",
            {
                "settings": settings.to_mapping(self.settings),
                "command": self._command,
                "versions": environment.versions(),
                "device": environment.device(),
                "git_revision": environment.git_revision(),
            },
        )


def run_together(works: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Run, resume or load every stage of studies that differ in their seed only.

    Their stages run side by side, batched over seeds where their loops are alike.

    Returns:
      The summary of each.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      DivergedError: training is no longer finite.
    """
    _make_alike(works)
    artifacts: list[dict[str, types.Tree]] = [{} for _ in works]
    finished: list[list[Done]] = [[] for _ in works]
    summaries: list[dict[str, Any]] = [{} for _ in works]
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        trackers = [stack.enter_context(work._opened()) for work in works]
        progress = stack.enter_context(_progress(works))
        for links in zip(*(work.plan() for work in works), strict=True):
            found = [
                work._reuse(*link, tracker)
                for work, link, tracker in zip(works, links, trackers, strict=True)
            ]
            missing = [i for i, one in enumerate(found) if one is None]
            signum = environment.highest(interruption.signum) if missing else 0
            if signum:
                raise Interrupted(signum)
            if missing:
                computed = _compute(
                    [works[i] for i in missing],
                    [links[i] for i in missing],
                    [artifacts[i] for i in missing],
                    [trackers[i] for i in missing],
                    progress,
                    interruption,
                )
                for i, one in zip(missing, computed, strict=True):
                    found[i] = one
            for i, (done, produced) in enumerate(found):
                artifacts[i] |= produced
                finished[i].append(done)
                summaries[i] = works[i]._write_summary(finished[i])
            progress.finished(links[0][0].name, reused=not missing)
        for summary, tracker in zip(summaries, trackers, strict=True):
            accuracy = summary["test_accuracy"]
            tracker.results({f"test/{n}": value for n, value in accuracy.items()})
    return summaries


@contextlib.contextmanager
def _progress(works: Sequence[Experiment]) -> Iterator[tracking.Progress]:
    """Of studies that run together; it tells if they end early."""
    flops = {name: len(works) * value for name, value in works[0].flops.items()}
    progress = tracking.Progress(
        [work.workdir for work in works], flops, writes=environment.is_primary()
    )
    try:
        yield progress
    except Interrupted:
        progress.stopped("interrupted")
        raise
    except errors.MosaicError:
        progress.stopped("failed")
        raise


def _make_alike(works: Sequence[Experiment]) -> None:
    """Pad the clients' index rows to one length: loops of one shape run together."""
    length = max(work.data.clients.client.index.shape[1] for work in works)
    for work in works:
        work.data = federated.padded(work.data, length)


def _compute(
    works: Sequence[Experiment],
    links: Sequence[tuple[Stage, str]],
    artifacts: Sequence[dict[str, types.Tree]],
    trackers: Sequence[tracking.Tracker],
    progress: tracking.Progress,
    interruption: Interruption,
) -> list[tuple[Done, dict[str, types.Tree]]]:
    """One stage of each study; what it costs is shared out evenly."""
    name = links[0][0].name
    _log.info("%s: running", name)
    with Stopwatch() as watch:
        loops = [
            work._loop(*link, tracker, progress, interruption, watch, 1 / len(works))
            for work, link, tracker in zip(works, links, trackers, strict=True)
        ]
        runs = [
            work.start(stage, inputs)
            for work, (stage, _), inputs in zip(works, links, artifacts, strict=True)
        ]
        outcomes = run_stage(loops, runs)
        spent = [loop.time_sheet.spent() for loop in loops]
    _log.info("%s: done in %.1f s", name, sum(watch.spent().values()))
    return [
        (work._save(*link, outcome, tracker, _cost(seconds)), outcome.artifacts)
        for work, link, outcome, tracker, seconds in zip(
            works, links, outcomes, trackers, spent, strict=True
        )
    ]


def _cost(spent: dict[str, float]) -> dict[str, Any]:
    """What a stage took; of memory this process's part is known."""
    return {
        "seconds": sum(spent.values()),
        "time": spent,
        "peak_memory_bytes": environment.peak_memory(),
    }


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
        **(
            {
                "audit": {
                    name: merge([s["audit"][name]["mean"] for s in summaries])
                    for name in first["audit"]
                }
            }
            if all("audit" in s for s in summaries)
            else {}
        ),
        "rounds": first["rounds"],
        "communication_bytes": first["communication_bytes"],
        "seconds": merge([s["seconds"] for s in summaries]),
        "time": merge([s["time"] for s in summaries]),
        "flops": merge([s["flops"] for s in summaries]),
        "compile_seconds": sum(s["compile_seconds"] for s in summaries),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
        "device": first["device"],
        "versions": first["versions"],
    }


def facts(works: Sequence[Experiment]) -> processes.Facts:
    """What all processes that run these studies must have alike, most telling first."""
    # Of the first; where others differ from it, they differ in their plans too.
    study = flax.traverse_util.flatten_dict(
        settings.to_mapping(works[0].settings), sep="."
    )
    # Images may lie elsewhere on another machine.
    del study["data.dir"]
    data, plan, done = {}, {}, {}
    for number, work in enumerate(works):
        name = f"study {number}" if len(works) > 1 else "the study"
        data[f"images and split of {name}"] = work.data.content_sha256
        plan |= {f"stage {stage.name} of {name}": f for stage, f in work.plan()}
        done[f"finished stages of {name}"] = [one.name for one in work.finished()]
    code = {"mosaic_jax": provenance.library_digest(), **environment.versions()}
    return {
        "settings": study | {"seeds": len(works)},
        "code": code,
        "data": data,
        "plan": plan,
        "run": done,
    }


def build_task(config: settings.Settings, info: Info, classifier: Classifier) -> Task:
    """What training on the server must know of a study."""
    return Task(
        classifier=classifier,
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        augmentation=info.augmentation,
        lowering=config.compute.convolution,
        batch_norm=config.server.batch_norm,
    )


def build_classifiers(config: settings.Settings, info: Info) -> dict[str, Classifier]:
    """The classifiers of a study by name; the server's is the first."""

    def one(name: str) -> Classifier:
        module = models.build_classifier(
            name,
            info.num_classes,
            width=config.model.width,
            dtype=config.model.dtype,
            lowering=config.compute.convolution,
            norm=config.model.norm,
            rate=config.model.rate,
        )
        return Classifier(module, info.mean, info.std)

    return {name: one(name) for name in config.networks}


def _check_methods(config: settings.Settings) -> None:
    """Refuse fields of a method that is in neither registry: nobody would read them.

    Raises:
      ConfigError: with the name that looks most like it.
    """
    known = [*algorithms.ALGORITHMS, *distillation.METHODS]
    for name in config.methods:
        if name not in known:
            hint = settings.near(str(name), known)
            raise errors.ConfigError(f"methods.{name}: unknown method, {hint}")


def _check_same_study(workdir: pathlib.Path, config: settings.Settings) -> None:
    """Stage settings may change within a run directory; what the study is may not."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = files.read_json(path)["settings"]
    except (errors.CheckpointError, KeyError):
        _log.warning("%s is damaged; it is written anew", path)
        return
    # As JSON has them: tuples are lists.
    new = json.loads(json.dumps(settings.to_mapping(config)))
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


def _check_fits(
    config: settings.Settings,
    data: federated.StudyData,
    algorithm: algorithms.Algorithm,
) -> None:
    if algorithm.partial and config.model.norm != "batch":
        raise errors.ConfigError(
            f"model.norm = {config.model.norm!r}: must be batch for init.method ="
            f" {config.init.method!r}, whose clients lack channels of a group"
        )
    if algorithm.partial and config.model.others:
        raise errors.ConfigError(
            f"model.others = {config.model.others}: must be () for init.method ="
            f" {config.init.method!r}, whose clients hold parts of one network"
        )
    if algorithm.partial and config.model.rate != 1:
        raise errors.ConfigError(
            f"model.rate = {config.model.rate}: must be 1 for init.method ="
            f" {config.init.method!r}: budgets say what clients hold"
        )
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


def _find(root: pathlib.Path, stage: Stage, identity: dict[str, Any]) -> Done | None:
    """The finished stage of this identity, if it is there with all that it provides.

    Its files must be those that its record was sealed with.
    """
    directory = _stage_directory(root, stage.name, identity["fingerprint"])
    if not (directory / "done.json").exists():
        return None
    try:
        record = files.read_json(directory / "done.json")
        checkpoint.check_identity(directory, record.get("identity"), identity)
        if record["files"] != _kept(directory):
            raise errors.CheckpointError(
                f"{directory}: its files are not those it was saved with"
            )
    except errors.CheckpointError as error:
        _log.warning("%s; stage %s runs again", error, stage.name)
        return None
    complete = set(stage.provides) <= set(record["provides"])
    return Done(stage.name, directory, record) if complete else None


def _kept(directory: pathlib.Path) -> dict[str, str]:
    """sha256 of every file of a finished stage but its record, by path.

    Of artifacts the seal counts, which has those of their files and is checked when
    these are read.
    """
    kept = [*directory.glob("artifacts/*/seal.json"), *directory.glob("pictures.npz")]
    return {path.relative_to(directory).as_posix(): files.sha256(path) for path in kept}


def _rebuild(cls: type, nested: Any) -> Any:
    """Dataclass `cls`, or a dict of such; empty subtrees are not on disk."""
    if typing.get_origin(cls) is dict:
        kind = typing.get_args(cls)[1]
        return {name: _rebuild(kind, value) for name, value in nested.items()}
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
    put("distilled", of("distill") or of("server"))
    for last in ("init", "warmup", "distill", "server", "finetune"):
        put("final", of(last))
        put("personal", of(last).get("personal", {}))
    return result
