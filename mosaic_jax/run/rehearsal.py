"""Studies gone through without computing anything: which programs each stage runs.

Stages run as they always do, but every program is told to an examiner, which knows its
costs, and zeros come back. So bytes sent, shapes and programs are those of the study.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from mosaic_jax.core import costs, programs, trees
from mosaic_jax.core.costs import Loop
from mosaic_jax.core.steps import Steps
from mosaic_jax.core.types import FederatedDataset, Tree
from mosaic_jax.data import federated, sources
from mosaic_jax.data.dataset import Arrays, Info
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.settings import Data
from mosaic_jax.fl.parallel import ClientAxis
from mosaic_jax.fl.schedule import Pieces
from mosaic_jax.run.devices import Device
from mosaic_jax.run.placement import Placement
from mosaic_jax.run.study import Study
from mosaic_jax.stages.base import Context, Link, Outcome


@dataclasses.dataclass(frozen=True)
class Seen:
    """A program as an examiner sees it.

    Attributes:
      loop: its kernels.
      memory: bytes that it needs on each device, its arguments included.
      results: shapes of its results.
      seconds: that its compilation took; 0 where it was not compiled, or was known.
    """

    loop: Loop
    memory: int
    results: Tree
    seconds: float = 0.0


# of a jitted function, its arguments, its named ones and a name for it
Examiner = Callable[[Any, tuple, dict[str, Any], str], Seen]


@dataclasses.dataclass
class Part:
    """A program of a stage, and how often the study runs it.

    Attributes:
      name: of the loop, or of the program.
      seen: the program.
      training: the loop of its training steps; all of it where there are none.
      steps: of that loop in the study; of other programs, the number of calls.
      chunks: how often the program is called, where it has a training loop.
      every: iterations of a loop around the training steps in each call.
    """

    name: str
    seen: Seen
    training: Loop
    steps: int
    chunks: int = 0
    every: int = 1

    def seconds(self, device: Device) -> float:
        """Roofline time in the study."""
        step = device.roofline(self.training.once())
        around = device.roofline(self.seen.loop.without(self.training), self.every)
        return self.steps * step + self.chunks * around

    @property
    def bytes(self) -> float:
        """Bytes moved in the study."""
        around = self.seen.loop.without(self.training).total(self.every).bytes
        return self.steps * self.training.iteration().bytes + self.chunks * around


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """A stage after its rehearsal.

    Attributes:
      link: the stage.
      parts: its programs.
      outcome: of the stage: bytes sent are those of the study, all arrays zeros.
      memory: the most bytes in use on a device: by a program and by what lies there
        from other stages.
    """

    link: Link
    parts: list[Part]
    outcome: Outcome
    memory: int


class _Recorder:
    """Takes down the programs of one stage."""

    def __init__(self, examine: Examiner, stage: str) -> None:
        self._examine, self._stage, self._times = examine, stage, 1
        self.parts: list[Part] = []

    def __call__(self, program: Any, args: tuple, named: dict[str, Any]) -> Tree:
        """Stand in for a call of a program."""
        name = _name(program)
        seen = self._examine(program, args, named, f"{self._stage} {name}")
        for part in self.parts:
            if part.name == name and part.seen.loop is seen.loop:
                part.steps += self._times
                break
        else:
            self.parts.append(Part(name, seen, seen.loop, self._times))
        return _zeros(seen.results)

    def loop(self, steps: Steps) -> None:
        """Take down a loop."""
        chunks = math.ceil(steps.num_steps / steps.every)
        if steps.work.on_host:
            self._times = chunks
            # Arrays in host memory are written to; those of a device cannot be.
            state = jax.tree.map(
                lambda leaf: _zeros(leaf) if isinstance(leaf, np.ndarray) else leaf,
                steps.state,
            )
            steps.window(steps.args, state, 0, steps.every)
            self._times = 1
            return
        program = jax.jit(steps.window, donate_argnums=1)
        args = steps.args, steps.state, np.asarray(0, np.int32), np.asarray(1, np.int32)
        seen = self._examine(program, args, {}, f"{self._stage} {steps.name}")
        path = _path(seen.loop)
        number = _num_steps(steps, path)
        # Rounds go around the steps of clients; windows of unequal work do not.
        every = steps.every if len(path) > 2 and not _windows(steps) else 1
        part = Part(steps.name, seen, path[-1], number, chunks, every)
        self.parts.append(part)


def rehearse(
    study: Study, examine: Examiner, wanted: Collection[str] = ()
) -> Iterator[Rehearsed]:
    """Go through the stages of a study.

    Args:
      study: of images that need not be real.
      examine: knows what a program costs.
      wanted: names of stages to stop after the last of; (): all.
    """
    placement, artifacts = Placement(study), {}
    waiting = set(wanted)
    for link in study.chain:
        context = placement.context(link)
        context = dataclasses.replace(context, axis=_still(context.axis))
        needed = {name: artifacts[name] for name in link.needs(study.settings)}
        resident = [tree for name, tree in artifacts.items() if name != "prototypes"]
        recorder = _Recorder(examine, link.name)
        sharing = placement.axis.sharing()
        with programs.recorded(recorder), sharing, _without_findings():
            outcome = _run(link, context, needed, recorder)
        artifacts |= outcome.artifacts
        left = _bytes_of_others(resident, needed)
        memory = left + max((part.seen.memory for part in recorder.parts), default=0)
        yield Rehearsed(link, recorder.parts, outcome, memory)
        waiting.discard(link.name)
        if wanted and not waiting:
            return


@contextlib.contextmanager
def _without_findings() -> Iterator[None]:
    """Keep to itself what stages find in results that are all 0."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _run(
    link: Link, context: Context, needed: dict[str, Tree], recorder: _Recorder
) -> Outcome:
    run, state = link.run(context, needed), None
    while True:
        try:
            steps = run.send(state)
        except StopIteration as end:
            return end.value
        recorder.loop(steps)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), steps.state)


def _bytes_of_others(resident: list[Tree], needed: dict[str, Tree]) -> int:
    """Bytes of what lies on the devices from other stages and this one does not use.

    An array that several artifacts hold, as the teacher does the experts, counts once.
    """
    left = {id(leaf): leaf for leaf in jax.tree.leaves(resident)}
    for leaf in jax.tree.leaves(needed):
        left.pop(id(leaf), None)
    return trees.num_bytes(list(left.values()))


@dataclasses.dataclass(frozen=True)
class _Still(ClientAxis):
    """A layout on which arrays stay where they are, as nothing runs on it."""

    def replicate(self, tree: Tree) -> Tree:
        return tree

    def gather(self, data: FederatedDataset, rows: np.ndarray) -> FederatedDataset:
        # No image is read.
        client = trees.take(data.client, rows)
        count = self.slots.size * client.index.shape[1]
        images = jax.tree.map(
            lambda leaf: np.zeros((count, *leaf.shape[1:]), leaf.dtype), data.images
        )
        return FederatedDataset(images, client)

    def of(self, count: int) -> ClientAxis:
        return _still(super().of(count))


def _still(axis: ClientAxis) -> ClientAxis:
    return _Still(axis.mesh, axis.slots, axis.at_once)


def _function(program: Any) -> Any:
    """What a jitted function is made of, without arguments that it was given before."""
    function = program.__wrapped__
    return getattr(function, "func", function)


def _code(function: Any) -> Any:
    """What tells the code of functions apart; of a loop's, that of its steps."""
    if isinstance(loop := getattr(function, "__self__", None), Steps):
        step = getattr(loop.work, "step", None)
        return type(loop.work), _code(step), _code(loop.measure)
    function = getattr(function, "func", function)
    return getattr(function, "__code__", function)


def _name(program: Any) -> str:
    return _function(program).__name__.strip("_<>")


def _zeros(shapes: Tree) -> Tree:
    """Zeros in host memory, which take none of it until they are written to."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _path(program: Loop) -> list[Loop]:
    """Loops from the whole program down to the innermost one over training steps."""
    below = [_path(loop) for loop in program.loops]
    found = [path for path in below if path[-1].trains]
    if not found:
        return [program]
    return [program, *max(found, key=lambda path: path[0].total().flops)]


def _windows(steps: Steps) -> list[Pieces]:
    return [leaf for leaf in steps.args if isinstance(leaf, Pieces)]


def _num_steps(steps: Steps, path: list[Loop]) -> int:
    """Training steps in the study, of all clients that run at once."""
    for windows in _windows(steps):
        # [windows, devices, pieces]; devices work side by side.
        return int(np.asarray(windows.count).sum(axis=(0, 2)).max())
    return steps.num_steps * math.prod(loop.trips or 1 for loop in path)


def made_up(config: Data, seed: int) -> StudyData | None:
    """Black images with balanced labels, split as the settings say.

    Returns:
      None where the data set is at hand, or nothing is known of it before it is read.
    """
    if sources.is_at_hand(config.name, config.dir):
        return None
    source = sources.SOURCES.find(config.name)
    assert source.info is not None  # else it would count as at hand

    def images(info: Info, count: int) -> tuple[np.ndarray, np.ndarray]:
        label = (np.arange(count) % info.num_classes).astype(np.int32)
        return np.zeros((count, *info.image_shape), np.uint8), label

    info, (num_train, num_test) = source.info, source.num_images
    arrays = Arrays(*images(info, num_train), *images(info, num_test))
    return federated.build(config, seed, info, arrays)


def _shape(leaf: Any) -> Any:
    """What a program's costs depend on of an argument."""
    if hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return int if isinstance(leaf, int) else leaf


class Counting:
    """Examines programs by tracing them alone, see `core.costs`.

    Programs of one name and code, for arguments of the same shapes, are traced once:
    the rounds of one stage are those of another, with other numbers.
    """

    def __init__(self) -> None:
        """No program is known yet."""
        self._known: dict[Any, Seen] = {}

    def __call__(
        self, program: Any, args: tuple, named: dict[str, Any], name: str
    ) -> Seen:
        """What tracing a program tells.

        Args:
          program: a jitted function.
          args: its arguments; arrays are read for their shapes alone.
          named: further ones.
          name: of stage and program.
        """
        leaves, structure = jax.tree.flatten((args, named))
        shapes = tuple(map(_shape, leaves))
        key = name.split()[-1], _code(program.__wrapped__), structure, shapes
        if key not in self._known:
            traced = program.trace(*args, **named)
            loop, memory = costs.of_jaxpr(traced.jaxpr)
            memory += trees.num_bytes([x for x in shapes if hasattr(x, "dtype")])
            self._known[key] = Seen(loop, memory, traced.out_info)
        return self._known[key]
