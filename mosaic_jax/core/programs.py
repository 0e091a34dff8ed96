"""Which devices programs are traced for, and who runs them: these here, or nobody."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mosaic_jax.core import sharing
from mosaic_jax.core.types import Tree

# of a jitted function, its arguments and its named ones: what it would return
Recorder = Callable[[Any, tuple, dict[str, Any]], Tree]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that programs are traced for and that need not be here.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      memory: bytes of each device that programs may use; None: not known.
      shapes: turns shapes into those on a device that programs can be compiled for;
        None: there is no compiler for it.
    """

    platform: str
    memory: int | None = None
    shapes: Callable[[Tree], Tree] | None = None


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "target", default=None
)
_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def target() -> Target | None:
    """The devices that programs are traced for; None: those that are here."""
    return _target.get()


def platform() -> str:
    """Kind of the devices that programs are traced for: "cpu", "gpu" or "tpu"."""
    found = _target.get()
    return found.platform if found else jax.default_backend()


@contextlib.contextmanager
def traced_for(target: str | Target) -> Iterator[None]:
    """Within it, programs are traced for other devices, or those of a platform."""
    with _set(_target, Target(target) if isinstance(target, str) else target):
        yield


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Within it, `recorder` is called in place of every program that `jit` makes."""
    with _set(_recorder, recorder):
        yield


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def jit(
    function: Callable[..., Any],
    *,
    assumed: Callable[[tuple, Tree], Tree] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`jax.jit`; programs made within `recorded` are told and not run.

    Where devices share batches, all of them get the results.

    Args:
      function: of the program.
      assumed: from the arguments and what the recorder returned to what takes the place
        of the results, where what follows depends on their values; None: the latter.
      options: of `jax.jit`.
    """
    if (everywhere := sharing.everywhere()) is not None:
        options |= {"out_shardings": everywhere}
    program, recorder = jax.jit(function, **options), _recorder.get()
    if recorder is None:
        return program

    def told(*args: Any, **named: Any) -> Tree:
        results = recorder(program, args, named)
        return assumed(args, results) if assumed else results

    return told
