"""Report of one run, or of several side by side.

mosaic report runs/digits_mosaic
mosaic report runs/a runs/b -o pages/a_and_b.html
"""

import pathlib
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from mosaic_jax.run import programs

    programs.end_on_interrupt()

from mosaic_jax.report import comparison, page, runs
from mosaic_jax.run import programs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a user's error."""
    parser = programs.parser("report", __doc__)
    parser.add_argument(
        "run",
        nargs="+",
        type=pathlib.Path,
        help="run directory; of several seeds, a comparison or a sweep: all in it",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=pathlib.Path,
        help="the page; else report.html in the run directory, or compare.html in this"
        " folder for several runs",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="charts to hover over and zoom in; needs plotly, adds 5 MB to a page",
    )
    args = parser.parse_args(arguments)
    return programs.exit_code(
        lambda: _write(args.run, args.output, interactive=args.interactive)
    )


def _write(
    paths: Sequence[pathlib.Path], output: pathlib.Path | None, *, interactive: bool
) -> None:
    groups = runs.collect(paths)
    studies = [run for group in groups.values() for run in group]
    if len(studies) == 1:
        print(page.write(studies[0].path, output, interactive=interactive))
        return
    for run in studies:
        page.write(run.path, interactive=interactive)
    output = output or pathlib.Path("compare.html")
    title = f"{len(groups)} studies compared"
    rows = comparison.write(groups, output, title=title, interactive=interactive)
    print(comparison.table(rows))
    print(output)


if __name__ == "__main__":
    sys.exit(main())
