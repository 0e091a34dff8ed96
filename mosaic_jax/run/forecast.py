"""The cost of a study from the shapes of its programs: nothing is compiled or run."""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator

from mosaic_jax.run import memory, rehearsal
from mosaic_jax.run import study as studies
from mosaic_jax.run.devices import Device
from mosaic_jax.run.rehearsal import Rehearsed
from mosaic_jax.run.settings import Compute
from mosaic_jax.run.study import Study

_HEAD = (
    f"{'stage':<22}{'steps':>9}{'TFLOP':>11}{'GB moved':>11}{'MB up':>10}"
    f"{'MB down':>10}{'GB needed':>11}{'seconds':>10}"
)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The expected cost of a stage, or of the study.

    Attributes:
      stage: its name.
      steps: of training, of all clients that run at once.
      flops: see `Stage.flops`.
      bytes: moved to and from the device's memory, see `core.costs`.
      up: bytes that clients send to the server.
      down: bytes that the server sends to clients.
      memory: the most bytes in use on a device.
      seconds: by the device's roofline; None: that is not known.
    """

    stage: str
    steps: int
    flops: float
    bytes: float
    up: int
    down: int
    memory: int
    seconds: float | None


def forecast(study: Study, device: Device | None) -> list[Forecast]:
    """The cost of each stage.

    Args:
      study: of images that need not be real.
      device: that programs are traced for; None: it is not known.
    """
    compute = study.settings.compute
    if device is None or compute.clients_at_once:
        return _with_compute(study, compute, device)
    # How many clients fit takes longer to find out than whether all do.
    count = study.data.clients.num_clients
    together = dataclasses.replace(compute, clients_at_once=count)
    found = _with_compute(study, together, device)
    if max(one.memory for one in found) <= memory.SHARE * device.free:
        return found
    return _with_compute(study, compute, device)


def _with_compute(
    study: Study, compute: Compute, device: Device | None
) -> list[Forecast]:
    # Generators of zeros would all count as collapsed.
    generators = dataclasses.replace(study.settings.generators, collapse_below=0.0)
    settings = dataclasses.replace(
        study.settings, generators=generators, compute=compute
    )
    trial = studies.build(settings, study.data)
    with _without_collection():
        found = rehearsal.rehearse(trial, rehearsal.Counting())
        return [_of_stage(one, study.flops, device) for one in found]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection: tracing makes millions of objects, hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _of_stage(
    found: Rehearsed, flops: dict[str, float], device: Device | None
) -> Forecast:
    return Forecast(
        stage=found.link.name,
        steps=sum(part.steps for part in found.parts if part.chunks),
        flops=flops[found.link.name],
        bytes=sum(part.bytes for part in found.parts),
        up=sum(found.outcome.up.values()),
        down=sum(found.outcome.down.values()),
        memory=found.memory,
        seconds=sum(part.seconds(device) for part in found.parts) if device else None,
    )


def _of_study(stages: list[Forecast]) -> Forecast:
    seconds = [one.seconds for one in stages if one.seconds is not None]
    return Forecast(
        stage="study",
        steps=sum(one.steps for one in stages),
        flops=sum(one.flops for one in stages),
        bytes=sum(one.bytes for one in stages),
        up=sum(one.up for one in stages),
        down=sum(one.down for one in stages),
        memory=max(one.memory for one in stages),
        seconds=sum(seconds) if seconds else None,
    )


def table(stages: list[Forecast], study: Study, device: Device | None) -> str:
    """The costs as text: a row for each stage and for the study, and what they mean.

    Args:
      stages: the result of `forecast`.
      study: the same as there.
      device: likewise.
    """
    total = _of_study(stages)
    lines = [_HEAD, *map(_row, stages), _row(total)]
    lines.append(f"parameters of the classifier: {study.num_parameters}")
    if device is None:
        lines.append("seconds: not known for this machine; --dry_run=measure tells")
    else:
        lines.append(
            f"seconds: at least, by the memory bandwidth and peak of {device.title};"
            " computed from shapes, not measured"
        )
        lines.append(_fit(total.memory, device, study))
    return "\n".join(lines)


def _row(one: Forecast) -> str:
    seconds = "unknown" if one.seconds is None else f"{one.seconds:.1f}"
    return (
        f"{one.stage:<22}{one.steps or '':>9}{one.flops / 1e12:>11.4g}"
        f"{one.bytes / 1e9:>11.4g}{one.up / 1e6:>10.1f}{one.down / 1e6:>10.1f}"
        f"{one.memory / 1e9:>11.2f}{seconds:>10}"
    )


def _fit(memory: int, device: Device, study: Study) -> str:
    """Whether the study fits the device, and if not what to lower."""
    needs = f"{memory / 1e9:.1f} GB of the {device.free / 1e9:.1f} GB"
    if memory <= device.free:
        return f"fits one {device.title}: needs {needs} that programs get"
    several = study.settings.compute.clients_at_once > 1
    lower = "compute.clients_at_once" if several else "model.width or a batch_size"
    where = f"does not fit one {device.title}"
    return f"{where}: needs {needs} that programs get: lower {lower}"
