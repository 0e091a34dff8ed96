"""Floating-point operations of pure functions, and of the steps made of them.

Throughout the library FLOPs are those of the model: two per multiply-add of the
networks, a training step counted as three forward passes, without what a backend
recomputes.
"""

from collections.abc import Callable

import jax

from mosaic_jax.core.types import Tree

# Cost in forward passes: the gradient of the input costs one more, and so does that of
# the parameters.
TRAINED = 3
THROUGH = 2


def count(function: Callable[..., Tree], *shapes: Tree) -> float:
    """FLOPs of one call `function(*shapes)`, as XLA counts before it optimises.

    A loop counts as one iteration. Nothing is run: `shapes` may be ShapeDtypeStructs.
    """
    analysis = jax.jit(function).lower(*shapes).cost_analysis()
    return float(analysis["flops"]) if analysis else 0.0
