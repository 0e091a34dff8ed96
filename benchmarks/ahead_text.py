"""What a compiled program does, read from its text: kernels, bytes, FLOPs, loops.

A kernel is an instruction that a device starts: a fusion with all that is fused into
it, a product, a copy. It moves its operands and its result once each; of an operand
that it only takes slices of, the slices; of a result that it updates in place, the
update. What lies in the memory of a TPU's core is not moved, and TPUs' tiles are moved
whole. What caches keep is not known, so bytes are an estimate of the traffic that is
good for comparisons. FLOPs are those of products and convolutions, two a multiply-add,
as they were compiled. What devices tell each other counts by the size of its results,
apart for sums (all-reduce, reduce-scatter) and all else.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from mosaic_jax.core import steps
from mosaic_jax.core.costs import Counts, Loop

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8,
    "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^{}]*\})?")
# These start nothing on the device.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_SUMS = {"all-reduce", "reduce-scatter"}
_EXCHANGES = {"all-gather", "all-to-all", "collective-permute", "ragged-all-to-all"}
_VIEWS = {"bitcast", "reshape"}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes
    text: str  # between the parentheses

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


def read(text: str) -> Loop:
    """The program whose compiled form is `text`, as `jax.stages.Compiled.as_text`."""
    return _Program(text).loop()


class _Program:
    """The computations of a program by name; their last instruction is the result."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._roots: dict[str, str] = {}
        self._entry = name = ""
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
            if head:
                name = head[2]
                self._entry = name if head[1] else self._entry
                self._computations[name] = {}
            elif name and line.startswith(" ") and (one := _instruction(line)):
                self._computations[name][one.name] = one
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = one.name

    def loop(self) -> Loop:
        return self._walk(self._entry, {})

    def _walk(self, name: str, known: dict[int, int]) -> Loop:
        """A computation whose parameter's elements `known` are these numbers."""
        own, loops = Counts(), []
        for one in self._computations[name].values():
            if one.op == "while":
                loops.append(self._while(name, one, known))
            elif one.op == "call":
                part = self._walk(one.attribute(r"to_apply=%?([\w.\-]+)"), {})
                own, loops = own + part.own, [*loops, *part.loops]
            elif one.op == "conditional":
                # The branch that does most.
                parts = [self._walk(branch, {}) for branch in _branches(one)]
                part = max(parts, key=lambda part: part.total().bytes)
                own, loops = own + part.own, [*loops, *part.loops]
            elif not _is_free(one):
                own += self._kernel(name, one)
        return Loop(own, tuple(loops))

    def _while(self, name: str, one: _Instruction, known: dict[int, int]) -> Loop:
        """A loop, with its number of iterations where the text has it."""
        body = one.attribute(r"body=%?([\w.\-]+)")
        condition = one.attribute(r"condition=%?([\w.\-]+)")
        entries = self._constants(name, one.operands[0], known)
        fixed = {i: n for i, n in entries.items() if self._is_fixed(body, i)}
        trips = one.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        count = int(trips) if trips else self._trips(condition, entries, fixed)
        inside, test = self._walk(body, fixed), self._walk(condition, fixed)
        # ".../training/while", with transformations around the scope's name.
        scope = one.attribute(r'op_name="[^"]*?([^"/]*)/while"')
        trains = steps.TRAINING in re.split(r"\W", scope)
        return Loop(inside.own + test.own, inside.loops, count, trains)

    def _trips(
        self, condition: str, entries: dict[int, int], fixed: dict[int, int]
    ) -> int | None:
        """Iterations of a loop whose counter goes up by 1 to a known bound."""
        test = self._computations[condition][self._roots[condition]]
        if test.op == "fusion":
            # The fusion has the comparison, the condition its operands.
            inner = test.attribute(r"calls=%?([\w.\-]+)")
            compared = self._computations[inner][self._roots[inner]]
            if not all(
                self._computations[inner][operand].op == "parameter"
                for operand in compared.operands
            ):
                return None
            order = [
                int(self._computations[inner][operand].text)
                for operand in compared.operands
            ]
            operands = [test.operands[i] for i in order]
        else:
            compared, operands = test, list(test.operands)
        if compared.op != "compare" or "direction=LT" not in compared.rest:
            return None
        counter = self._computations[condition][operands[0]]
        bound = self._number(condition, operands[1], fixed)
        if counter.op != "get-tuple-element" or bound is None:
            return None
        start = entries.get(int(counter.attribute(r"index=(\d+)")))
        return None if start is None else bound - start

    def _constants(
        self, name: str, operand: str, known: dict[int, int]
    ) -> dict[int, int]:
        """Elements of a tuple that are known numbers."""
        made = self._computations[name][operand]
        if made.op != "tuple":
            return {}
        found = {
            i: self._number(name, one, known) for i, one in enumerate(made.operands)
        }
        return {i: number for i, number in found.items() if number is not None}

    def _number(self, name: str, operand: str, known: dict[int, int]) -> int | None:
        """The number that a scalar is known to be."""
        one = self._computations[name][operand]
        if one.op == "constant":
            return int(one.text) if re.fullmatch(r"-?\d+", one.text) else None
        if one.op in ("copy", "bitcast", "copy-start", "copy-done"):
            return self._number(name, one.operands[0], known)
        source = one.operands and self._computations[name][one.operands[0]]
        if one.op == "get-tuple-element" and source and source.op == "parameter":
            return known.get(int(one.attribute(r"index=(\d+)")))
        return None

    def _is_fixed(self, body: str, index: int) -> bool:
        """Whether an iteration hands an element of the loop's tuple on unchanged."""
        computation = self._computations[body]
        root = computation[self._roots[body]]
        if root.op != "tuple":
            return False
        one = computation[root.operands[index]]
        while one.op in ("copy", "copy-start", "copy-done"):
            one = computation[one.operands[0]]
        return (
            one.op == "get-tuple-element"
            and computation[one.operands[0]].op == "parameter"
            and int(one.attribute(r"index=(\d+)")) == index
        )

    def _kernel(self, name: str, one: _Instruction) -> Counts:
        computation = self._computations[name]
        cycles = one.attribute(r'"estimated_cycles":"(\d+)"')
        called = one.attribute(r"calls=%?([\w.\-]+)")
        types = [computation[operand].type for operand in one.operands]
        flops = _flops(one, types)
        if called:
            flops = self._flops_within(called)
            moved = self._written(called, one.type) + sum(
                self._taken(called, i, _size(type_)) for i, type_ in enumerate(types)
            )
        else:
            moved = _moved(one, types)
        op, size = one.op.removesuffix("-start"), _size(one.type)
        if op in _EXCHANGES and op != one.op:
            size -= sum(map(_size, types))  # a start's type has its operands as well
        summed, exchanged = size * (op in _SUMS), size * (op in _EXCHANGES)
        return Counts(1, moved, flops, float(cycles or 0), summed, exchanged)

    @functools.cache  # noqa: B019
    def _flops_within(self, name: str) -> float:
        """FLOPs of a computation that is fused, or runs asynchronously."""
        computation, total = self._computations[name], 0.0
        for one in computation.values():
            types = [computation[operand].type for operand in one.operands]
            called = one.attribute(r"calls=%?([\w.\-]+)")
            total += self._flops_within(called) if called else _flops(one, types)
        return total

    @functools.cache  # noqa: B019
    def _taken(self, name: str, number: int, size: int) -> int:
        """Bytes that a fusion reads of its parameter `number`, of `size` bytes."""
        for one in self._computations[name].values():
            if one.op == "parameter" and one.text == str(number):
                return min(size, self._read_of(name, one.name, size))
        return size

    def _read_of(self, name: str, operand: str, size: int) -> int:
        total = 0
        for user in self._computations[name].values():
            for position, used in enumerate(user.operands):
                if used != operand:
                    continue
                if user.op in _VIEWS:
                    total += self._read_of(name, user.name, size)
                elif user.op in _SLICES and position == 0:
                    total += _size(user.type)
                elif user.op == "dynamic-update-slice" and position == 0:
                    pass  # the rest stays as it is
                elif user.op == "fusion":
                    called = user.attribute(r"calls=%?([\w.\-]+)")
                    total += self._taken(called, position, size)
                else:
                    return size
        return total

    def _written(self, name: str, type_: str) -> int:
        """Bytes that a fusion writes."""
        computation = self._computations[name]

        def written(one: _Instruction) -> int:
            while one.op in _VIEWS:
                one = computation[one.operands[0]]
            if one.op == "dynamic-update-slice":
                return _size(computation[one.operands[1]].type)
            if one.op == "tuple":
                return sum(written(computation[part]) for part in one.operands)
            return _size(one.type)

        return min(_size(type_), written(computation[self._roots[name]]))


def _instruction(line: str) -> _Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line)
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    after = head.end()
    end = _closing(line, after) if line[after] == "(" else line.index(" ", after)
    type_ = line[after:end]
    op = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not op:
        return None
    opened = end + op.end() - 1
    closed = _closing(line, opened)
    text = line[opened + 1 : closed - 1]
    operands = () if op[1] == "constant" else tuple(re.findall(r"%([\w.\-]+)", text))
    return _Instruction(head[1], type_, op[1], operands, line[closed:], text)


def _closing(line: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    return len(line)


def _branches(one: _Instruction) -> list[str]:
    listed = one.attribute(r"branch_computations=\{([^}]*)\}")
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed)
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", one.rest)


def _is_free(one: _Instruction) -> bool:
    if one.op in _FREE or one.op.endswith(("-done", "-update")):
        return True
    return one.op == "custom-call" and _target(one) in _FREE_CALLS


def _target(one: _Instruction) -> str:
    return one.attribute(r'custom_call_target="([^"]+)"')


def _moved(one: _Instruction, types: list[str]) -> int:
    """Bytes that an instruction alone in its kernel moves."""
    if one.op in _SLICES:
        return 2 * _size(one.type) + sum(map(_size, types[1:]))
    if one.op == "dynamic-update-slice":
        return 2 * _size(types[1]) + sum(map(_size, types[2:]))
    if one.op == "copy-start":
        # Its type is the copy, the operand and a context.
        return _array_size(*next(_arrays(one.type))) + _size(types[0])
    return _size(one.type) + sum(map(_size, types))


def _arrays(type_: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for kind, dims, layout in _ARRAY.findall(type_):
        if kind in _BYTES:
            yield kind, tuple(int(n) for n in dims.split(",") if n), layout


def _size(type_: str) -> int:
    """Bytes of arrays in the device's main memory, with the padding of their tiles."""
    return sum(_array_size(*array) for array in _arrays(type_))


def _array_size(kind: str, dims: tuple[int, ...], layout: str) -> int:
    if re.search(r"S\([1-9]", layout):
        return 0  # in the memory of a core
    sizes = [dims[int(i)] for i in re.findall(r"\d+", layout.split(":")[0])]
    tile = re.search(r":T\(([\d,]+)\)", layout)
    if tile and len(sizes) == len(dims):
        for i, n in enumerate(reversed(tile[1].split(","))):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // int(n)) * int(n)
        return math.prod(sizes) * _BYTES[kind]
    return math.prod(dims) * _BYTES[kind]


def _dims(type_: str) -> tuple[int, ...]:
    return next(dims for _, dims, _ in _arrays(type_))


def _flops(one: _Instruction, types: list[str]) -> float:
    """FLOPs of a product or convolution, 0 of anything else."""
    if one.op == "dot":
        return _of_product(one, types, r"lhs_contracting_dims=\{([\d,]*)\}")
    if one.op == "convolution":
        return _of_convolution(one, types)
    if one.op != "custom-call":
        return 0.0
    if _target(one).startswith("__cublas"):
        return _of_product(one, types, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    if _target(one).startswith("__cudnn$conv"):
        kind = _target(one).removeprefix("__cudnn$conv")
        maps, kernel = {
            "BackwardInput": (types[0], types[1]),
            "BackwardFilter": (types[1], one.type),
        }.get(kind, (one.type, types[1]))
        labels = one.attribute(r"dim_labels=\w+_(\w+)->")
        outputs = _dims(kernel)[labels.index("o")]
        return 2.0 * math.prod(_dims(maps)) * math.prod(_dims(kernel)) / outputs
    return 0.0


def _of_product(one: _Instruction, types: list[str], pattern: str) -> float:
    contracted = re.findall(r"\d+", one.attribute(pattern))
    depth = math.prod(_dims(types[0])[int(i)] for i in contracted)
    return 2.0 * math.prod(_dims(one.type)) * depth


def _of_convolution(one: _Instruction, types: list[str]) -> float:
    """Zeros between the elements of a dilated operand are not counted, padding is."""
    labels = one.attribute(r"dim_labels=\w+_(\w+)->")
    depth = _dims(types[1])[labels.index("i")]
    window = [int(n) for n in one.attribute(r"size=([\dx]+)").split("x") if n]
    zeros = [int(n) for n in one.attribute(r"lhs_dilate=([\dx]+)").split("x") if n]
    places = math.prod(_dims(one.type)) * math.prod(window) / math.prod(zeros)
    return 2.0 * places * depth
