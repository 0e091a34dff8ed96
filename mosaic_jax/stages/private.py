"""What a private study tells of its privacy: in its record, its report and its log."""

import dataclasses

from mosaic_jax.fl.accounting import Plan
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import Outcome

# More clients than this are told of by the least and the most.
_MOST_ROWS = 50


def told(plan: Plan, outcome: Outcome) -> Outcome:
    """`outcome` with a section of the report on the noise, and what it is worth."""
    text = (
        f"Differential privacy of {plan.neighbours}, with delta {plan.delta:g}: epsilon"
        f" of {_what(plan)}, and of each payload by itself. This page itself shows more"
        " than that, to whoever holds all images."
    )
    table = sections.Table(
        head=("client", "noise multiplier", "epsilon", *plan.by_payload),
        rows=_rows(plan),
        caption="Noise and epsilon",
    )
    section = sections.Section("Privacy", (sections.Text(text), table))
    return dataclasses.replace(outcome, section=section)


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    columns = [plan.noise, plan.epsilon, *plan.by_payload.values()]
    if len(plan.noise) > _MOST_ROWS:
        return [
            (name, *(f"{pick(column):.3g}" for column in columns))
            for name, pick in (("least", min), ("most", max))
        ]
    return [
        (str(client), *(f"{column[client]:.3g}" for column in columns))
        for client in range(len(plan.noise))
    ]


def line(plan: Plan) -> str:
    """What the log tells before the study runs."""
    low, high = min(plan.noise), max(plan.noise)
    return (
        f"private: epsilon {max(plan.epsilon):.3g} at delta {plan.delta:g} for"
        f" {plan.neighbours}; noise multipliers {low:.3g} to {high:.3g}"
    )


def _what(plan: Plan) -> str:
    """What it is that tells no more."""
    if plan.of_clients is None or plan.of_clients.local:
        return "all that a client sends"
    return "all global models"
