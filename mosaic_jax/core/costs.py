"""What programs cost, counted without compiling or running them.

The model is simple. Products and convolutions read their operands and write their
results. A reduction reads what its operand is computed from. Whatever else is computed
element by element is fused into those that read it; only what a product, a loop or the
end of the program reads is written, once, by a kernel that reads what it is computed
from. Slices and gathered rows are read, not the arrays that they are of; updates in
place write the update. It knows nothing of caches, of layouts and the copies that they
need, of padding to tiles, of kernels that a compiler merges or splits, nor of its
temporary memory.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

from mosaic_jax.core import steps
from mosaic_jax.core.types import Tree

_PRODUCTS = {"dot_general", "conv_general_dilated"}
_REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "argmax", "argmin", "reduce",
}  # fmt: skip
_PARTS = {"gather", "dynamic_slice", "slice"}
_UPDATES = {"dynamic_update_slice": 1}  # scatters have theirs third
# Free where the size stays.
_VIEWS = {
    "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p",
    "broadcast_in_dim", "bitcast_convert_type",
}  # fmt: skip
_WHOLE = {"sort", "top_k", "cumsum", "cummax", "cumprod", "fft", "reduce_window"}
# What enters a program as one of its parts.
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "remat2", "checkpoint", "custom_vmap_call", "shard_map",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """What some kernels do.

    Attributes:
      kernels: number of them.
      bytes: moved to and from the device's memory.
      flops: of products and convolutions, two a multiply-add.
      cycles: that a compiler expects them to take; 0 where it does not tell.
      summed: bytes that devices add up, of the results that each of them gets.
      exchanged: bytes of other results that devices get from each other.
    """

    kernels: float = 0
    bytes: float = 0
    flops: float = 0
    cycles: float = 0
    summed: float = 0
    exchanged: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    def __rmul__(self, times: float) -> "Counts":
        return Counts(*(times * a for a in self._all))

    @property
    def _all(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program, or the whole program as a loop of one iteration.

    Attributes:
      own: what an iteration does outside of the loops within it.
      loops: those within it.
      trips: number of iterations; None: not known before it runs.
      trains: whether it is one over training steps, see `steps.train`.
    """

    own: Counts
    loops: tuple["Loop", ...] = ()
    trips: int | None = 1
    trains: bool = False

    def iteration(self, unknown: float = 1) -> Counts:
        """All that one iteration does; loops of unknown length take `unknown`."""
        inner = (loop.total(unknown) for loop in self.loops)
        return sum(inner, start=self.own)

    def total(self, unknown: float = 1) -> Counts:
        """All that the loop does; loops of unknown length take `unknown` iterations."""
        trips = unknown if self.trips is None else self.trips
        return trips * self.iteration(unknown)

    def once(self) -> "Loop":
        """One iteration, as a program."""
        return dataclasses.replace(self, trips=1)

    def without(self, left_out: "Loop") -> "Loop":
        """The same without one of the loops within it."""
        kept = (loop.without(left_out) for loop in self.loops if loop is not left_out)
        return dataclasses.replace(self, loops=tuple(kept))


def of(function: Callable[..., Tree], *shapes: Tree) -> tuple[Loop, int]:
    """Costs of one call `function(*shapes)`, and bytes that it needs besides those."""
    return of_jaxpr(jax.make_jaxpr(function)(*shapes))


def of_jaxpr(closed: core.ClosedJaxpr) -> tuple[Loop, int]:
    """Costs of a traced program, and bytes that it needs besides its arguments.

    The second is the most that is alive at once of what kernels write.
    """
    body = _Body()
    loop = body.run(closed.jaxpr, [_Value(_size(v.aval)) for v in closed.jaxpr.invars])
    return loop, body.peak()


class _Value:
    """An array of a program, written to memory or not (yet).

    Attributes:
      size: bytes.
      sources: what its kernel reads; None once it is in memory.
      begin: number of the kernel that writes it; None: it is never written.
      end: number of the last kernel that reads it.
    """

    def __init__(self, size: int, sources: "frozenset[_Value] | None" = None) -> None:
        self.size, self.sources = size, sources
        self.begin: int | None = None
        self.end = -1

    def read_from(self) -> "frozenset[_Value]":
        """What a kernel that this is fused into reads."""
        return frozenset((self,)) if self.sources is None else self.sources


class _Body:
    """The kernels of a program outside of its loops, or of an iteration of a loop."""

    def __init__(self) -> None:
        self._now = 0  # kernels and loops so far
        self._kernels, self._bytes, self._flops = 0, 0, 0.0
        self._loops: list[Loop] = []
        self._written: list[_Value] = []
        self._within: dict[int, int] = {}  # bytes that a loop needs, by its number
        self._reductions: dict[frozenset[_Value], int] = {}

    def run(self, jaxpr: core.Jaxpr, inputs: Sequence[_Value]) -> Loop:
        """Count a computation, and write its results."""
        for value in self._inline(jaxpr, inputs, [True] * len(jaxpr.outvars)):
            self._write(value)
            value.end = self._now
        own = Counts(self._kernels, self._bytes, self._flops)
        return Loop(own, tuple(self._loops))

    def peak(self) -> int:
        """The most bytes that are alive at once of what was written."""
        change = [0] * (self._now + 3)
        for value in self._written:
            if value.begin is not None:
                change[value.begin] += value.size
                change[max(value.end, value.begin) + 1] -= value.size
        alive, most = 0, 0
        for number, delta in enumerate(change):
            alive += delta
            most = max(most, alive + self._within.get(number, 0))
        return most

    def _inline(
        self, jaxpr: core.Jaxpr, inputs: Sequence[_Value], used: Sequence[bool]
    ) -> list[_Value]:
        """The results of a computation, those that are not `used` without meaning."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> _Value:
            if not _is_var(atom):
                return _Value(0, frozenset())
            if atom not in known:  # a constant of the program
                known[atom] = _Value(_size(atom.aval))
            return known[atom]

        for eqn, needed in _needed(jaxpr, used):
            results = self._equation(eqn, [value(atom) for atom in eqn.invars], needed)
            known.update(zip(eqn.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, inputs: list[_Value], needed: list[bool]
    ) -> list[_Value]:
        name, sizes = eqn.primitive.name, [_size(v.aval) for v in eqn.outvars]
        if name in _CALLS:
            return self._inline(_inner(eqn), inputs, needed)
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "while":
            return self._while(eqn, inputs)
        if name == "cond":
            return self._cond(eqn, inputs)
        if name in _PRODUCTS or name in _WHOLE:
            for one in inputs:
                self._write(one)
            results = [_Value(size) for size in sizes]
            self._kernel(inputs, results)
            self._flops += _flops(eqn)
            return results
        if name in _REDUCTIONS:
            return self._reduce(inputs, sizes)
        if name == "optimization_barrier":
            for one in inputs:
                self._write(one)
            return inputs
        if name in _VIEWS and sizes[0] == inputs[0].size:
            return inputs[:1]
        if name in _PARTS:
            self._write(inputs[0])
            inputs[0].end = self._now
            return [_Value(sizes[0])]
        if name in _UPDATES or name.startswith("scatter"):
            self._write(inputs[0])
            update = inputs[_UPDATES.get(name, 2)]
            result = _Value(sizes[0])
            result.begin = self._now
            self._start(update.size + _total(update.read_from()))
            return [result]
        sources = frozenset().union(*(one.read_from() for one in inputs))
        return [_Value(size, sources) for size in sizes]

    def _reduce(self, inputs: list[_Value], sizes: list[int]) -> list[_Value]:
        """Reductions of the same arrays are one kernel."""
        sources = frozenset().union(*(one.read_from() for one in inputs))
        results = [_Value(size) for size in sizes]
        if sources in self._reductions:
            for result in results:
                result.begin = self._reductions[sources]
            self._written += results
            self._bytes += sum(sizes)
        else:
            self._reductions[sources] = self._now
            self._kernel(sources, results)
        return results

    def _write(self, value: _Value) -> None:
        """Write a value that has only been fused into others so far."""
        if value.sources is not None:
            sources, value.sources = value.sources, None
            if value.size:
                self._kernel(sources, [value])

    def _kernel(self, reads: Iterable[_Value], writes: list[_Value]) -> None:
        reads = tuple(reads)
        for one in reads:
            one.end = self._now
        for one in writes:
            one.begin = self._now
        self._written += writes
        self._start(_total(reads) + _total(writes))

    def _start(self, num_bytes: int) -> None:
        self._kernels, self._now = self._kernels + 1, self._now + 1
        self._bytes += num_bytes

    def _loop(
        self, body: "_Body", loop: Loop, inputs: list[_Value], sizes: list[int]
    ) -> list[_Value]:
        """Take in a loop, whose results take the place of its state."""
        for one in inputs:
            self._write(one)
            one.end = self._now
        self._within[self._now] = body.peak()
        self._loops.append(loop)
        self._now += 1
        results = [_Value(size) for size in sizes]
        for one in results:
            one.begin = self._now
        self._written += results
        return results

    def _scan(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
        jaxpr, body = eqn.params["jaxpr"].jaxpr, _Body()
        loop = body.run(jaxpr, [_Value(_size(v.aval)) for v in jaxpr.invars])
        loop = dataclasses.replace(
            loop, trips=eqn.params["length"], trains=_trains(eqn)
        )
        return self._loop(body, loop, inputs, [_size(v.aval) for v in eqn.outvars])

    def _while(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
        jaxpr, body = eqn.params["body_jaxpr"].jaxpr, _Body()
        loop = body.run(jaxpr, [_Value(_size(v.aval)) for v in jaxpr.invars])
        loop = dataclasses.replace(loop, trips=None, trains=_trains(eqn))
        return self._loop(body, loop, inputs, [_size(v.aval) for v in eqn.outvars])

    def _cond(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
        """The branch that moves most."""
        bodies = []
        for branch in eqn.params["branches"]:
            body, jaxpr = _Body(), branch.jaxpr
            loop = body.run(jaxpr, [_Value(_size(v.aval)) for v in jaxpr.invars])
            bodies.append((loop.total().bytes, len(bodies), body, loop))
        _, _, body, loop = max(bodies)
        return self._loop(body, loop, inputs, [_size(v.aval) for v in eqn.outvars])


def _needed(jaxpr: core.Jaxpr, used: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """The equations that `used` results depend on, and which of theirs are used."""
    wanted = {
        v for v, use in zip(jaxpr.outvars, used, strict=True) if use and _is_var(v)
    }
    found = []
    for eqn in reversed(jaxpr.eqns):
        uses = [v in wanted for v in eqn.outvars]
        if any(uses):
            found.append((eqn, uses))
            wanted |= set(filter(_is_var, eqn.invars))
    return found[::-1]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _trains(eqn: Any) -> bool:
    """Whether a loop is one of `steps.train`."""
    scope = str(eqn.source_info.name_stack).split("/")[-1]
    return steps.TRAINING in re.split(r"\W", scope)


def _inner(eqn: Any) -> core.Jaxpr:
    """The computation that a call calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if name in eqn.params:
            found = eqn.params[name]
            return getattr(found, "jaxpr", found)
    raise NotImplementedError(eqn.primitive.name)


def _total(values: Iterable[_Value]) -> int:
    return sum(one.size for one in values)


def _size(aval: Any) -> int:
    """Bytes of an array."""
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(getattr(aval, "shape", ())) * itemsize


def _flops(eqn: Any) -> float:
    """FLOPs of a product or convolution, without the zeros of dilation."""
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
        _, depth, *window = (kernel[i] for i in numbers.rhs_spec)
        zeros = math.prod(eqn.params["lhs_dilation"])
        return 2.0 * out * depth * math.prod(window) / zeros
    return 0.0
