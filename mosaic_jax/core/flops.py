"""Floating-point operations of pure functions, and of the steps made of them.

Throughout the library FLOPs are those of the model: two per multiply-add of its matrix
products and convolutions, a training step counted as three forward passes, without what
a backend recomputes. So no version of a compiler changes them.
"""

import contextvars
from collections.abc import Callable

from mosaic_jax.core import costs
from mosaic_jax.core.types import Tree

# Cost in forward passes: the gradient of the input costs one more, and so does that of
# the parameters.
TRAINED = 3
THROUGH = 2
_counting: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "counting", default=False
)


def count(function: Callable[..., Tree], *shapes: Tree) -> float:
    """FLOPs of the products and convolutions of one call `function(*shapes)`.

    Those in a loop count in each iteration, in one whose length is not known before it
    runs once; borders count as if the image went on. Nothing is run or compiled:
    `shapes` may be ShapeDtypeStructs.
    """
    token = _counting.set(True)
    try:
        # A function of its own, whose trace nothing else finds.
        loop, _ = costs.of(lambda *args: function(*args), *shapes)
    finally:
        _counting.reset(token)
    return loop.total().flops


def counting() -> bool:
    """Whether what is traced now is only counted: without forms that waste FLOPs."""
    return _counting.get()
