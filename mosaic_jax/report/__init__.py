"""Figures of runs, and self-contained pages that show them."""

import pathlib


def write(workdir: pathlib.Path, *, interactive: bool = False) -> pathlib.Path:
    """As `page.write`; what draws is imported by then, and so not before it is used."""
    from mosaic_jax.report import page

    return page.write(workdir, interactive=interactive)
