"""The trained models of a finished study, by their names in its summary."""

from collections.abc import Mapping

from mosaic_jax.run.store import Record

# The model that is a study's answer.
FINAL = "final"
# Artifacts that are a model of the server's network, by which stages hand them on.
_MODELS = ("global_model", "student", "final_model")


def places(records: Mapping[str, Record]) -> dict[str, tuple[str, str]]:
    """Stage and artifact of each model by its name, in the order of their making.

    Args:
      records: of the finished stages by name, in order.
    """
    found: dict[str, tuple[str, str]] = {}
    for stage, record in records.items():
        for artifact in _MODELS:
            if artifact in record.provides:
                for name in _names(stage, record):
                    found.pop(name, None)  # it moves to its later place
                    found[name] = (stage, artifact)
    return found


def _names(stage: str, record: Record) -> list[str]:
    """What the model that a stage hands on is called: see `stages.base.Outcome`."""
    told = [name for name in record.models if name in (stage, "distilled", FINAL)]
    return told or [stage]
