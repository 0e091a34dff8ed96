"""Tables of Markdown."""

from collections.abc import Iterable, Iterator, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, of cells that are Markdown on one line; "|" within them is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def read(text: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Every table of a page: the heading above it, its head, its rows."""
    heading, lines = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("| ").split(" | ")])
            continue
        if lines:
            yield heading, lines[0], lines[2:]
            lines = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
