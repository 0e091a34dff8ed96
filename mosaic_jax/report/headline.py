"""What a study found, in one sentence of numbers that its summary has."""

from mosaic_jax.report import glossary
from mosaic_jax.report.runs import FINAL, SavedRun

OWN = "personal"
# Of the stages' headline numbers, that of what generated images give away.
_LEAK = "auc"


def sentence(run: SavedRun) -> str:
    """The final accuracy, how it compares, and what the generators give away."""
    test, settings = run.summary.test_accuracy, run.settings
    parts = [_final(run)]
    if "teacher" in test:
        parts.append(f"its teacher has {percent(test['teacher'])}")
    if "distilled" in test and test["distilled"] != test.get(FINAL):
        parts.append(f"before the last rounds it had {percent(test['distilled'])}")
    leak = run.summary.headline.get(_LEAK)
    if leak and settings["method"] == "mosaic":
        parts.append(
            "who sees generated images tells training images from others with an AUC"
            f" of {leak['mean']:.2f} (0.5 is chance)"
        )
    return "; ".join(parts) + "."


def _final(run: SavedRun) -> str:
    test = run.summary.test_accuracy
    first = glossary.model("init", run.settings)
    if FINAL not in test:
        return f"Clients' own models {percent(test[OWN])}" if OWN in test else first
    if test.get("init") in (None, test[FINAL]):
        name = glossary.method(run.settings)
        return f"{name} {percent(test[FINAL])} after {run.summary.rounds} rounds"
    points = 100 * (test[FINAL] - test["init"])
    rounds = run.settings["init"].get("rounds")
    after = f" after {rounds} rounds" if rounds else ""
    side = "above" if points >= 0 else "below"
    return (
        f"Final model {percent(test[FINAL])}: {abs(points):.1f} points {side}"
        f" {first}{after} ({percent(test['init'])})"
    )


def percent(value: float) -> str:
    """A share as a headline has it."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
