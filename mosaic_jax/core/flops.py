"""Floating-point operations of pure functions, and of the steps made of them.

Throughout the library FLOPs are those of the model: two per multiply-add of the
networks, a training step counted as three forward passes, without what a backend
recomputes.
"""

import contextvars
from collections.abc import Callable

import jax

from mosaic_jax.core.types import Tree

# Cost in forward passes: the gradient of the input costs one more, and so does that of
# the parameters.
TRAINED = 3
THROUGH = 2
_counting: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "counting", default=False
)


def count(function: Callable[..., Tree], *shapes: Tree) -> float:
    """FLOPs of one call `function(*shapes)`, as XLA counts before it optimises.

    A loop counts as one iteration. Nothing is run: `shapes` may be ShapeDtypeStructs.
    """
    token = _counting.set(True)
    try:
        # A function of its own, whose trace nothing else finds.
        lowered = jax.jit(lambda *args: function(*args)).lower(*shapes)
    finally:
        _counting.reset(token)
    analysis = lowered.cost_analysis()
    return float(analysis["flops"]) if analysis else 0.0


def counting() -> bool:
    """Whether what is traced now is only counted: without forms that waste FLOPs."""
    return _counting.get()
