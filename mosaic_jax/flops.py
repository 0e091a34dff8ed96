"""Floating-point operations of pure functions, and of the steps made of them.

Throughout the library FLOPs are those of the model: twice the multiply-adds of the
networks, what a training step costs counted as three forward passes, without what a
backend recomputes.
"""

from collections.abc import Callable

import jax

from mosaic_jax.types import Tree

# Of a forward pass. The gradient of the input costs one more, that of parameters too.
TRAINED = 3
THROUGH = 2


def count(function: Callable[..., Tree], *shapes: Tree) -> float:
    """Of one call, as XLA counts before it optimises; loops count one turn."""
    return float(jax.jit(function).lower(*shapes).cost_analysis()["flops"])
