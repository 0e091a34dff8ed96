"""Figures of runs, and self-contained pages that show them."""

from mosaic_jax.report.page import write

__all__ = ["write"]
