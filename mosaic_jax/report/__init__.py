"""Figures of a run, and one self-contained page that shows them."""

from mosaic_jax.report.page import write

__all__ = ["write"]
