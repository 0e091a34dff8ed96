"""What the attacks on clients' uploads found, in words and tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mosaic_jax.stages import sections
from mosaic_jax.stages.gradients import Inverted

TITLE = "Attacks"
Row = Mapping[str, Any]
# Clients whose rows a table has at most.
_MOST_ROWS = 60
MEANING = (
    "chance that an attacker by {attack}, who sees a client's {payload}, ranks one of"
    " its images above one that no client holds; 0.5: nothing leaks"
)
PICTURES = ("of the client", "found by its gradient")


def broken(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each claim of an epsilon that an attack speaks against.

    By bounds that all hold together with 95 %, so that no study is warned of by chance
    because it has many clients.
    """
    for row in rows:
        claimed, low = row["epsilon_claimed"], row["epsilon_lower_together"]
        if claimed is not None and low is not None and low > claimed:
            yield (
                f"{_who(row)}: {row['payload']} by {row['attack']}: epsilon is at least"
                f" {low:.3g}, but {claimed:.3g} is claimed: the study is less private"
                " than it says"
            )


def headline(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The area under the curve of each attack on all clients, for the summary."""
    return {
        f"{row['payload']}_{row['attack'].replace(' ', '_')}_auc": {
            "mean": row["auc"]["value"],
            "low": row["auc"]["low"],
            "high": row["auc"]["high"],
            "meaning": MEANING.format(**row),
        }
        for row in rows
        if row["client"] is None and row["auc"] is not None
    }


def section(rows: Sequence[Row], inverted: Sequence[Inverted]) -> sections.Section:
    """What was found of all clients, of each, and of gradients."""
    of_all = [row for row in rows if row["client"] is None]
    of_each = [row for row in rows if row["client"] is not None]
    blocks: list[sections.Block] = [sections.Text(line) for line in _told(rows)]
    blocks.append(_table(of_all, "Attacks on all clients together"))
    if of_each and len(of_each) <= _MOST_ROWS:
        blocks.append(_table(of_each, "Attacks on single clients"))
    elif of_each:
        blocks.append(
            sections.Scatter(
                name="attacks",
                x=[row["members"] for row in of_each if row["auc"]],
                y=[row["auc"]["value"] for row in of_each if row["auc"]],
                xlabel="images of the client that were asked of",
                ylabel="membership-inference AUC",
                level=0.5,
                caption="Attacks on single clients; 0.5 is chance.",
            )
        )
    if inverted:
        blocks += _of_gradients(inverted)
    return sections.Section(TITLE, blocks)


def pictures(inverted: Sequence[Inverted]) -> dict[str, np.ndarray]:
    """Images of clients, and those that were found, by the names of columns."""
    if not inverted:
        return {}
    sides = ([one.image for one in inverted], [one.found for one in inverted])
    return {name: np.stack(side) for name, side in zip(PICTURES, sides, strict=True)}


def _told(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "An attacker who sees what a client sends is asked which images the client"
        " trained on: its own, or as many of the same classes that nobody holds. Found"
        " at 1 % false alarms: the share of the client's images that are named when one"
        " in a hundred others is named too; no number where there are too few others to"
        " tell. Intervals are of 95 %."
    )
    if any(row["canaries"] for row in rows):
        yield (
            "Planted images were trained on or not by the toss of a coin; how many"
            " coins are guessed bounds epsilon from below. Each number holds by itself"
            " with 95 % confidence; a warning is of bounds that all hold together with"
            " 95 %. It can come no higher than what all guesses being right would give."
        )
    for line in broken(rows):
        yield f"Warning: {line}."


def _table(rows: Sequence[Row], caption: str) -> sections.Table:
    found = {
        "who": _who,
        "payload": lambda row: row["payload"],
        "attack": lambda row: row["attack"],
        "AUC": lambda row: _interval(row["auc"]),
        "found at 1 % false alarms": lambda row: _interval(row["tpr_at_fpr"]["1%"]),
        "at 0.1 %": lambda row: _interval(row["tpr_at_fpr"]["0.1%"]),
        "images": lambda row: f"{row['members']} + {row['others']}",
        "epsilon claimed": lambda row: _number(row["epsilon_claimed"]),
        "at least": lambda row: _number(row["epsilon_lower"]),
        "could show": lambda row: _number(row["epsilon_reach"]),
    }
    cells = {name: [of(row) for row in rows] for name, of in found.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    return sections.Table(
        head=tuple(cells), rows=list(zip(*cells.values(), strict=True)), caption=caption
    )


def _of_gradients(inverted: Sequence[Inverted]) -> list[sections.Block]:
    """What was found by gradients, in numbers and pictures."""
    return [
        sections.Table(
            head=("client", "found, dB", "by chance, dB"),
            rows=[
                (str(one.client), f"{one.psnr:.1f}", f"{one.by_chance:.1f}")
                for one in inverted
            ],
            caption="Gradient inversion: peak signal-to-noise ratio of images found by"
            " the gradient of one step, and of others of the same classes",
        ),
        sections.Strips(
            name="inverted",
            head=("client", *PICTURES),
            names=[f"client {one.client}" for one in inverted],
            columns=PICTURES,
            caption="Images whose gradient a client sent, and what was found by it.",
        ),
    ]


def _who(row: Row) -> str:
    return "all clients" if row["client"] is None else f"client {row['client']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
