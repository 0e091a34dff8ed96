"""Arrays by name from files of PyTorch and of safetensors; nothing in them is run.

A `.pth` file is a zip archive of raw arrays and a pickle that puts them together. Its
few instructions are read here one by one (`pickletools` only decodes them), and what is
neither a number, a container nor a tensor is refused. So PyTorch is not needed.
"""

import dataclasses
import importlib
import math
import pathlib
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import errors

SUFFIXES = (".pth", ".pt", ".safetensors")
# Under these names training scripts keep the arrays, beside an epoch or an optimiser.
_WRAPPERS = ("state_dict", "model", "net")
# Put before every name by PyTorch's modules for several devices.
_PREFIX = "module."
_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MARK = object()


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays by name of a file that ends in one of `SUFFIXES`.

    Raises:
      CheckpointError: it is missing, damaged, of another kind, or holds more than
        arrays.
      ConfigError: the package safetensors is needed.
    """
    if not path.is_file():
        raise errors.CheckpointError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise errors.CheckpointError(f"{path}: must end in one of {known}")
    reader = _safetensors if path.suffix == ".safetensors" else _pytorch
    try:
        return reader(path)
    except errors.MosaicError:
        raise
    except Exception as error:  # damage shows in many ways
        raise errors.CheckpointError(
            f"{path}: is damaged or of another kind: {errors.reason(error)}"
        ) from error


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as safetensors.

    Raises:
      ConfigError: the package safetensors is needed.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    _package(path).save_file(contiguous, path)


def _package(path: pathlib.Path) -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise errors.ConfigError(
            f"{path}: needs the package safetensors: pip install safetensors"
        ) from error


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    return _package(path).load_file(path)


def _pytorch(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise errors.CheckpointError(
            f"{path}: must be a zip archive, as torch.save has written since 1.6"
        )
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        found = _Machine(archive, folder).run(archive.read(pickled))
    for name in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not any(
        isinstance(value, np.ndarray) for value in found.values()
    ):
        raise ValueError("must hold tensors by name, a state dict")
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name!r} is no tensor")
    if all(name.startswith(_PREFIX) for name in found):
        return {name.removeprefix(_PREFIX): value for name, value in found.items()}
    return found


@dataclasses.dataclass(frozen=True)
class _Global:
    """What a pickle calls by its name; it is never looked up."""

    name: str


class _Machine:
    """The stack of a pickle, for the instructions that tensors are made of."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """What the pickle stands for."""
        for code, argument, _ in pickletools.genops(pickled):
            self._step(code.name, argument)
        (result,) = self._stack
        return result

    def _step(self, code: str, argument: Any) -> None:
        stack = self._stack
        constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
        empty = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
        if code in ("PROTO", "FRAME", "STOP"):
            pass
        elif code in constants:
            stack.append(constants[code])
        elif code in empty:
            stack.append(empty[code]())
        elif "INT" in code or "FLOAT" in code or "UNICODE" in code or code == "LONG1":
            stack.append(argument)
        elif code == "GLOBAL":
            stack.append(_Global(argument.replace(" ", ".")))
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(self._memo) if argument is None else argument
            self._memo[number] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif code in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            count = len(stack) - self._mark() if code == "TUPLE" else int(code[-1])
            stack.append(tuple(self._taken(count, marked=code == "TUPLE")))
        elif code in ("SETITEM", "SETITEMS"):
            items = self._items(2 if code == "SETITEM" else None)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif code in ("APPEND", "APPENDS"):
            items = self._items(1 if code == "APPEND" else None)
            stack[-1].extend(items)
        elif code == "BUILD":  # the attributes of an OrderedDict
            stack.pop()
        elif code == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        else:
            raise ValueError(f"it holds more than tensors: {code}")

    def _mark(self) -> int:
        """Number of values below what comes after the last mark."""
        places = [i for i, value in enumerate(self._stack) if value is _MARK]
        return places[-1] + 1

    def _taken(self, count: int, *, marked: bool) -> list[Any]:
        """The last `count` values, which leave the stack, along with their mark."""
        first = len(self._stack) - count
        values = self._stack[first:]
        del self._stack[first - marked :]
        return values

    def _items(self, count: int | None) -> list[Any]:
        """The last `count` values; None: those after the last mark."""
        if count is not None:
            return self._taken(count, marked=False)
        return self._taken(len(self._stack) - self._mark(), marked=True)

    def _storage(self, told: tuple) -> np.ndarray:
        """The numbers [n] of a storage ("storage", its type, its name, device, n)."""
        _, kind, name, _, count = told
        dtype = _DTYPES.get(kind.name.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"tensors of {kind.name} are not known")
        data = self._archive.read(f"{self._folder}data/{name}")
        return np.frombuffer(data, dtype, count)

    def _call(self, function: _Global, arguments: tuple) -> Any:
        if function.name == "collections.OrderedDict" and not arguments:
            return {}
        if function.name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if function.name != "torch._utils._rebuild_tensor_v2":
            raise ValueError(f"it holds more than tensors: {function.name}")
        storage, offset, shape, strides, *_ = arguments
        if math.prod(shape) == 0:
            return np.zeros(shape, storage.dtype)
        last = offset + sum(
            (n - 1) * step for n, step in zip(shape, strides, strict=True)
        )
        inside = min((offset, *strides)) >= 0 and last < len(storage)
        if not inside or math.prod(shape) > len(storage):
            raise ValueError(f"a tensor {shape} does not lie in its storage")
        size = storage.dtype.itemsize
        return np.lib.stride_tricks.as_strided(
            storage[offset:], shape, [step * size for step in strides], writeable=False
        ).copy()
